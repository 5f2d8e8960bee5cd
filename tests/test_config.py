"""Composing: what the command line may say, and what is said when it can't be used."""

from __future__ import annotations

import re

import pytest
import yaml
from omegaconf import OmegaConf

from composed import checked, composed
from stabletrain import config
from stabletrain.config.resolvers import _overrides, _sweep
from stabletrain.errors import ConfigurationError


def yaml_files():
    return sorted(config.conf_folder().glob("**/*.yaml"))


# ------------------------------------------------------------------------------------------------------- the files


def test_every_key_in_every_config_has_a_comment():
    files = yaml_files()
    assert len(files) > 30
    bare = []
    for file in files:
        lines = file.read_text().splitlines()
        in_defaults = False
        for number, line in enumerate(lines):
            if re.match(r"\S", line):
                in_defaults = line.startswith(("defaults:", "hydra:"))
            key = re.match(r"\s*[\"']?[A-Za-z_][\w]*[\"']?:", line)
            if key is None or in_defaults or line.lstrip().startswith(("#", "_target_", "_partial_")):
                continue
            above = lines[number - 1].lstrip().startswith("#") if number > 0 else False
            opens_a_commented_block = line.rstrip().endswith(":") and lines[number + 1].lstrip().startswith("#")
            if not (above or " #" in line or opens_a_commented_block):
                bare.append(f"{file.relative_to(config.conf_folder())}:{number + 1} {line.strip()}")
    assert bare == []


def test_every_global_config_says_so_in_its_first_line():
    files = [file for file in yaml_files() if file.parent.name in ("preset", "experiment")]
    assert len(files) >= 6
    for file in files:
        assert file.read_text().splitlines()[0] == "# @package _global_", file


def test_no_option_has_a_name_that_yaml_reads_as_something_else():
    for file in yaml_files():
        assert isinstance(yaml.safe_load(file.stem), str), file
        assert file.stem == file.stem.lower()


def test_every_group_is_in_the_defaults_and_has_options():
    chosen = checked()
    assert len(config.group_names()) == 16
    for group in config.group_names():
        assert "_target_" in chosen[group], group
        assert len(config.option_names(group)) >= 1, group


def test_every_option_is_built_by_the_module_of_its_group():
    for group in config.group_names():
        for option in config.option_names(group):
            target = OmegaConf.load(config.conf_folder() / group / f"{option}.yaml")["_target_"]
            assert target.startswith(f"stabletrain.{group}."), (group, option)


def test_every_key_at_the_root_has_a_rule_and_stands_in_the_help():
    primary = OmegaConf.load(config.conf_folder() / "config.yaml")
    keys = {str(key) for key in primary} - {"defaults", "hydra", "preset", "experiment"}
    assert keys == {key.partition(".")[0] for key in config.values.RULES} - set(config.group_names())
    listed = primary.hydra.help.template.partition("Keys at the root")[2]
    assert keys <= set(re.findall(r"\w+", listed))


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("given", "plain", "flags"),
    [
        (["+preset=safe", "seed=1"], ["preset=safe", "seed=1"], []),
        (["++experiment=tabular", "-m", "+preset=a,b"], ["experiment=tabular", "preset=a,b"], ["-m"]),
        (["seed=1", "--config-dir", "x=y", "model=m"], ["seed=1", "model=m"], ["--config-dir", "x=y"]),
        (["--info", "defaults", "seed=1"], ["seed=1"], ["--info", "defaults"]),
        (["--info", "seed=1"], ["seed=1"], ["--info"]),
        (["--cfg", "job", "--resolve", "~x"], ["~x"], ["--cfg", "job", "--resolve"]),
        (["-sc", "install=bash"], ["install=bash"], ["-sc"]),
    ],
)
def test_the_command_line_is_brought_into_hydras_order(given, plain, flags):
    assert config.arrange(given) == (plain, flags)


@pytest.mark.parametrize(
    "given", [["preset=safe", "+preset=safe"], ["+experiment=a", "seed=1", "experiment=b"], ["preset=a", "preset=b"]]
)
def test_two_presets_or_experiments_are_refused(given):
    with pytest.raises(ConfigurationError, match=r"2 times.*give it once"):
        config.arrange(given)


def test_the_first_bare_word_is_the_command():
    assert config.split_command(["train", "seed=1"], ["train", "doctor"]) == ("train", ["seed=1"])
    assert config.split_command(["seed=1"], ["train", "doctor"]) == ("train", ["seed=1"])
    assert config.split_command(["-m", "train"], ["train", "doctor"]) == ("train", ["-m", "train"])
    assert config.split_command([], ["train", "doctor"]) == ("train", [])
    with pytest.raises(ConfigurationError, match=r"'doktor' is no command; allowed: train, doctor\. Did you mean 'doc"):
        config.split_command(["doktor"], ["train", "doctor"])


@pytest.mark.parametrize("given", ["preset=null", "clipping=null", "+preset=", "~clipping", "~guard=skip", "data="])
def test_a_group_can_not_be_left_without_an_option(given):
    with pytest.raises(ConfigurationError, match="without an option; allowed: "):
        config.check_overrides([given], [])


def test_a_word_that_sets_nothing_is_refused():
    with pytest.raises(ConfigurationError, match=r"'presets' sets nothing.*Did you mean 'preset'"):
        config.check_overrides(["presets"], [])


# --------------------------------------------------------------------------------------------------- values and keys


@pytest.mark.parametrize(
    "override",
    [
        *("batch_size=0", "batch_size=-4", "batch_size=2.5", "batch_size=true", "batch_size=many", "batch_size=null"),
        *("base_lr=-1e-4", "base_lr=nan", "base_lr=inf", "base_lr=-inf", "base_lr=fast", "base_lr=[1]", "lr_scale=nan"),
        *("optimizer.lr=-1", "optimizer.lr=nan", "optimizer.lr=null"),
        *("epochs=0", "epochs=1.5", "epochs=abc", "seed=a", "seed=-1", "seed=1.0", "seed=null", "accumulate=0"),
        *("warmup_epochs=-1", "warmup_from=1.5", "loss_mode=plin", "device=gpu", "threads=0", "workers=-1"),
        *("log_every=0", "debug=3", "resume=3", "name=''", "name=null", "name=../a", "name=a/../b"),
        *("checkpoint_every_updates=0", "fp16_initial_scale=0", "fp16_growth_interval=0"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(override):
    key = override.partition("=")[0]
    with pytest.raises(ConfigurationError, match=rf"^{key}=.* is not allowed; {key} is "):
        checked(override)


@pytest.mark.parametrize(
    "override",
    ["base_lr=0", "base_lr=1", "threads=2", "threads=null", "device=cuda:1", "resume=some/path", "name=a/b", "seed=0"],
)
def test_a_value_at_the_edge_is_taken(override):
    key = override.partition("=")[0]
    assert str(checked(override)[key]).replace("None", "null") == override.partition("=")[2]


def test_accumulate_must_divide_the_batch():
    assert checked("batch_size=32", "accumulate=4")["accumulate"] == 4
    with pytest.raises(ConfigurationError, match=r"batch_size=30 .* accumulate=4 .* such as 2"):
        checked("batch_size=30", "accumulate=4")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+gaurd.max_rejected=1", r"unknown key 'gaurd'.*Did you mean 'guard'"),
        ("++lr_scal=1", r"unknown key 'lr_scal'.*Did you mean 'lr_scale'"),
        ("+guard.windw=1", r"unknown key 'guard\.windw'.*Did you mean 'window'.*Keys of guard: .*max_rejected"),
        ("++optimizer.weight_dekay=1", r"unknown key 'optimizer\.weight_dekay'.*Did you mean 'weight_decay'"),
        ("+clipping.clipp=1", r"unknown key 'clipping\.clipp'.*Keys of clipping: max_norm"),
    ],
)
def test_a_misspelled_key_behind_a_plus_is_refused(override, message):
    with pytest.raises(ConfigurationError, match=message):
        checked(override)


def test_a_key_of_ones_own_is_taken_where_something_reads_it():
    assert checked("+width=7", "model.hidden=${width}")["model"]["hidden"] == 7
    with pytest.raises(ConfigurationError, match="unknown key 'width': nothing reads it"):
        checked("+width=7")


def test_settings_are_plain_resolved_containers():
    values = checked("base_lr=0.5", "preset=safe")

    def kinds(node):
        if isinstance(node, dict):
            return {dict}.union(*(kinds(item) for item in node.values()))
        if isinstance(node, list):
            return {list}.union(*(kinds(item) for item in node))
        return {type(node)}

    assert kinds(values) <= {dict, list, str, int, float, bool, type(None)}
    assert values["optimizer"]["lr"] == pytest.approx(0.05)
    assert "${" not in repr(values)


def test_a_missing_value_is_named():
    with pytest.raises(ConfigurationError, match=r"data\.path has no value; give it as data\.path=<value>"):
        checked("data=csv", "data.target=kind")
    with pytest.raises(ConfigurationError, match="can't be resolved: Interpolation key 'nothing' not found"):
        checked("name=${nothing}")


# ------------------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "nosuchpackage.Net",
            r"model\._target_=nosuchpackage\.Net can't be imported: there is no module 'nosuch",
        ),
        ("torch.nn.Linea", r"torch\.nn \(.*\) has no 'Linea'\. Did you mean 'Linear'"),
        ("Net", "no dotted name"),
        ("stabletrain.model.__name__", "is a str; name a class or a function"),
    ],
)
def test_a_target_that_is_not_there_is_explained(target, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=message) as caught:
        checked(f"model._target_={target}")
    if "imported" in message:
        assert str(tmp_path) in str(caught.value)


def test_an_error_inside_somebodys_module_comes_through(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        checked("model._target_=needs_more.Net")


# --------------------------------------------------------------------------------------------------------------- names


def test_names_tell_runs_apart_and_are_the_same_within_one():
    config.stamp.cache_clear()
    first = composed("preset=safe", "experiment=tabular").name
    assert re.fullmatch(r"tabular-safe-\d{8}-\d{6}-[0-9a-f]{4}", first)
    assert first == composed("preset=safe", "experiment=tabular").name
    config.stamp.cache_clear()
    assert first != composed("preset=safe", "experiment=tabular").name


def test_all_ranks_of_a_launch_share_a_name(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    config.stamp.cache_clear()
    assert composed().name == "digits-normal-job7"
    config.stamp.cache_clear()


def test_folders_of_a_sweep():
    config.stamp.cache_clear()
    assert _sweep(composed().name) == f"sweep-{config.stamp()}"
    assert _sweep("mine") == "mine"
    assert _overrides("preset=safe,seed=0,name=mine") == "preset=safe,seed=0"
    assert _overrides("") == "job"
    paths = {_overrides(f"data.path=/a/{name}") for name in ("b c", "b_c", "b/c")}
    assert len(paths) == 3
    assert all("/" not in path for path in paths)
    long = {_overrides(f"x={'1' * 300}{end}") for end in "ab"}
    assert len(long) == 2
    assert all(len(path) < 128 for path in long)
