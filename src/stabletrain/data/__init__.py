"""Data: the options of the group `data`, data sets in memory, and loaders whose position is plain data."""

from __future__ import annotations

from stabletrain.data.arrays import ArrayDataset, Microbatch, Part, class_targets
from stabletrain.data.auto import with_facts
from stabletrain.data.bags import DigitBags, digit_bags, from_bag_table
from stabletrain.data.builtin import breast_cancer, digits, sequences
from stabletrain.data.embeddings import digit_embeddings, embeddings_of_file
from stabletrain.data.files import from_csv, from_npz, from_parquet
from stabletrain.data.histories import ItemHistories, collate_histories, stories, text_embeddings
from stabletrain.data.interaction_table import from_interaction_table
from stabletrain.data.interactions import HeldOut, Interactions, interaction_splits
from stabletrain.data.item_sequences import item_sequences
from stabletrain.data.loader import Loader, OrderedLoader, collate
from stabletrain.data.pairs import Pairs
from stabletrain.data.series import regimes, windows_of_file
from stabletrain.data.splits import Splits, split_dataset, split_indices
from stabletrain.data.table import Table
from stabletrain.data.tastes import tastes
from stabletrain.data.text import text
from stabletrain.data.windows import Series, Windows

__all__ = [
    "ArrayDataset",
    "DigitBags",
    "HeldOut",
    "Interactions",
    "ItemHistories",
    "Loader",
    "Microbatch",
    "OrderedLoader",
    "Pairs",
    "Part",
    "Series",
    "Splits",
    "Table",
    "Windows",
    "breast_cancer",
    "class_targets",
    "collate",
    "collate_histories",
    "digit_bags",
    "digit_embeddings",
    "digits",
    "embeddings_of_file",
    "from_bag_table",
    "from_csv",
    "from_interaction_table",
    "from_npz",
    "from_parquet",
    "interaction_splits",
    "item_sequences",
    "regimes",
    "sequences",
    "split_dataset",
    "split_indices",
    "stories",
    "tastes",
    "text",
    "text_embeddings",
    "windows_of_file",
    "with_facts",
]
