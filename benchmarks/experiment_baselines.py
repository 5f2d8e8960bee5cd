"""What the experiments are held against: libraries' baselines, what else is measured of ours, and a model by hand."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

Numbers = dict[str, float]


def boosted_statistics(splits: Any, seed: int) -> Numbers:
    """Gradient boosting on mean, deviation, last value and slope of each column in a window."""
    import torch
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score

    def table(part: Any) -> tuple[Any, Any]:
        windows, targets = part.gather(torch.arange(len(part)))
        time_axis = torch.linspace(-1, 1, windows.shape[1]).view(1, -1, 1)
        columns = [windows.mean(1), windows.std(1), windows[:, -1], (windows * time_axis).mean(1)]
        return torch.cat(columns, 1).numpy(), targets.numpy()

    model = HistGradientBoostingClassifier(max_iter=100, class_weight="balanced", random_state=seed)
    model.fit(*table(splits.train))
    features, real = table(splits.test)
    answers = model.predict(features)
    return {
        "macro_f1": float(f1_score(real, answers, average="macro")),
        "balanced_accuracy": float(balanced_accuracy_score(real, answers)),
        "accuracy": float(accuracy_score(real, answers)),
    }


def pooled_regression(pooling: str) -> Callable[[Any, int], Numbers]:
    """Logistic regression on each bag's mean or largest features."""

    def fitted(splits: Any, seed: int) -> Numbers:
        import numpy as np
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        parts = (splits.train, splits.test)
        pooled = [np.stack([getattr(bag.numpy(), pooling)(0) for bag in part.inputs]) for part in parts]
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000, random_state=seed))
        model.fit(pooled[0], splits.train.targets)
        return {
            "auc": float(roc_auc_score(splits.test.targets, model.decision_function(pooled[1]))),
            "accuracy": float(model.score(pooled[1], splits.test.targets)),
        }

    return fitted


def found_by_attention(model: Any, splits: Any) -> Numbers:
    """How often the most attended instance of a bag with the digit is the digit, and how often any instance is."""
    import torch

    part = splits.test
    with torch.no_grad():
        weights = model.eval().attention(part.inputs)
    positive = [place for place, target in enumerate(part.targets.tolist()) if target == 1]
    is_digit = [part.digits[place] == 9 for place in positive]
    found = [bool(digit[int(weights[place].argmax())]) for place, digit in zip(positive, is_digit, strict=True)]
    return {
        "finds_the_digit": sum(found) / len(found),
        "by_chance": statistics.mean(float(digit.float().mean()) for digit in is_digit),
    }


def plain_softmax(model: Any) -> Any:
    """Attention with the softmax as its formula says it, which knows no empty bag and no large score."""
    import torch

    class Naive(type(model)):  # type: ignore[misc]
        def forward(self, bags: Any) -> torch.Tensor:
            mean = []
            for encoded in self.encoder(torch.cat(list(bags))).split([len(bag) for bag in bags]):
                scores = self.score(torch.tanh(self.content(encoded)) * torch.sigmoid(self.gate(encoded)))
                mean.append((scores.exp() * encoded).sum(0) / scores.exp().sum())
            return self.classifier(self.dropout(torch.stack(mean)))

    model.__class__ = Naive
    return model


def ranked(scores: Any, part: Any) -> Numbers:
    """Return what `task=recommendation` reports for scores [users, items] that were known before."""
    import torch
    from torch import nn

    from stabletrain.data import OrderedLoader
    from stabletrain.loss import BPR
    from stabletrain.task import Recommendation

    class Known(nn.Module):
        def forward(self, batch: dict[str, Any]) -> Any:
            return torch.as_tensor(scores)[batch["user"]]

    return Recommendation(BPR()).evaluate(Known(), OrderedLoader(part, batch_size=256))


def chosen(splits: Any) -> Any:
    """Return who chose what in training, float64 [users, items]."""
    import numpy as np

    matrix = np.zeros((int(splits.test.users.max()) + 1, len(splits.test.cold)))
    matrix[splits.train.users, splits.train.items] = 1
    return matrix


def popularity(splits: Any, seed: int) -> Numbers:
    """What most users chose in training, for all alike."""
    matrix = chosen(splits)
    return ranked(matrix.sum(0, keepdims=True).repeat(len(matrix), 0), splits.test)


def factorised(splits: Any, seed: int) -> Numbers:
    """Truncated singular value decomposition of who chose what; of 4 to 64 factors what is best on validation."""
    from sklearn.decomposition import TruncatedSVD

    matrix = chosen(splits)
    tried = []
    for factors in (4, 8, 16, 32, 64):
        model = TruncatedSVD(factors, random_state=seed)
        scores = model.inverse_transform(model.fit_transform(matrix))
        tried.append((ranked(scores, splits.validation)["recall_at_20"], factors, scores))
    return ranked(max(tried, key=lambda one: one[:2])[2], splits.test)


def k_means(splits: Any, seed: int) -> Numbers:
    """The same embeddings, k-means fitted to the training part's, with as many clusters as there are classes."""
    import torch
    from sklearn.cluster import KMeans

    from stabletrain.task import agreement

    train, test = splits.train.embeddings.numpy(), splits.test.embeddings.numpy()
    labels = splits.test.targets
    classes = int(splits.train.targets.max()) + 1
    found = KMeans(classes, n_init=10, random_state=seed).fit(train).predict(test)
    places = torch.from_numpy(found).long() * classes + labels
    return agreement(torch.bincount(places, minlength=classes**2).view(classes, classes))


def placed(scores: Any, part: Any, targets: Any) -> Numbers:
    """Return what `task=next_item` reports for scores [samples, items] that were counted in training."""
    import torch
    from torch import nn

    from stabletrain.data import ArrayDataset, OrderedLoader
    from stabletrain.loss import CrossEntropy
    from stabletrain.task import NextItem

    task = NextItem(CrossEntropy(), class_counts=torch.bincount(targets, minlength=scores.shape[1]).tolist())
    return task.evaluate(nn.Identity(), OrderedLoader(ArrayDataset(scores, part.targets), batch_size=256))


def most_chosen(splits: Any, seed: int) -> Numbers:
    """How often each item was chosen in training, whatever the history."""
    import torch

    train, test = splits.train, splits.test
    counts = torch.bincount(train.targets, minlength=len(train.text)).double()
    return placed(counts.expand(len(test), -1), test, train.targets)


def after_the_last(splits: Any, seed: int) -> Numbers:
    """How often each item came next after the history's last item in training; among equals, how often at all."""
    import numpy as np
    import torch
    from scipy.sparse import coo_matrix

    train, test = splits.train, splits.test
    last, items = train.items[train.places - 1].numpy(), len(train.text)
    pairs = coo_matrix((np.ones(len(last)), (last, train.targets.numpy())), shape=(items, items)).tocsr()
    followed = torch.from_numpy(pairs[test.items[test.places - 1].numpy()].toarray())
    counts = torch.bincount(train.targets, minlength=items).double()
    return placed(followed + counts / (len(last) + 1), test, train.targets)
