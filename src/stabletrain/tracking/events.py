"""TensorBoard event files, written record by record.

The messages are TensorBoard's own compiled ones (20 ms to import). Its writer classes, or torch's `SummaryWriter`, take
150 ms or more to import and write from a thread, where an error of the disk surfaces late or never. The framing
of a record is a few lines: length, checksum of the length, data, checksum of the data.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # type: ignore[import-untyped]
from tensorboard.compat.proto.types_pb2 import DT_STRING  # type: ignore[import-untyped]
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2  # type: ignore[import-untyped]

from stabletrain.folder import AppendedFile

_CRC32C_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
_CRC32C_MASK = 0xA282EAD8


def _crc32c_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_CRC32C_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _crc32c_table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C checksum (RFC 3720, appendix B.4) of `data`.

    Example:
        >>> hex(crc32c(b"123456789"))
        '0xe3069283'
    """
    crc, table = 0xFFFFFFFF, _TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + _CRC32C_MASK) & 0xFFFFFFFF


def record(data: bytes) -> bytes:
    """Return `data` framed as one record of an event file."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", _masked(length)), data, struct.pack("<I", _masked(data))))


class EventFile:
    """One event file of a run, each event in it as soon as it is given.

    Args:
        folder: the run's folder.
        purge_step: TensorBoard hides what earlier files of this run hold from this step on.

    Raises:
        OSError: the file can't be written.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        # TensorBoard reads a run's files in the order of their names.
        begun = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*.stabletrain")]
        number = max([int(time.time()), *(second + 1 for second in begun)])
        self._file = AppendedFile(folder / f"events.out.tfevents.{number:010d}.stabletrain")
        try:
            self._write(Event(file_version="brain.Event:2", step=0))
            # In the first file too: TensorBoard takes the first start that it sees for no restart, and hides nothing.
            self._write(Event(session_log=SessionLog(status=SessionLog.START), step=purge_step))
        except OSError:
            self.close()
            raise

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._file.append(record(event.SerializeToString()))

    def scalars(self, step: int, values: Iterable[tuple[str, float]]) -> None:
        """Add one point to each of the curves `values` names."""
        event = Event(step=step)
        add = event.summary.value.add
        for tag, value in values:
            add(tag=tag, simple_value=value)
        self._write(event)

    def text(self, step: int, tag: str, text: str) -> None:
        """Add a text in Markdown."""
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = Summary.Value(tag=f"{tag}/text_summary", metadata=metadata)
        value.tensor.dtype = DT_STRING
        value.tensor.string_val.append(text.encode())
        value.tensor.tensor_shape.dim.add(size=1)
        self._write(Event(step=step, summary=Summary(value=[value])))

    def begin_hparams(self, settings: Mapping[str, Any]) -> None:
        """Let the HPARAMS tab list this run with `settings`, given flat: dotted names, numbers, booleans and text."""
        start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in settings.items():
            if isinstance(value, bool):
                start.hparams[name].bool_value = value
            elif isinstance(value, (int, float)):
                start.hparams[name].number_value = value
            else:
                start.hparams[name].string_value = str(value)
        self._hparams("session_start_info", plugin_data_pb2.HParamsPluginData(session_start_info=start))

    def end_hparams(self, completed: bool) -> None:
        """Tell the HPARAMS tab how the run ended."""
        status = api_pb2.STATUS_SUCCESS if completed else api_pb2.STATUS_FAILURE
        end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        self._hparams("session_end_info", plugin_data_pb2.HParamsPluginData(session_end_info=end))

    def _hparams(self, name: str, data: Any) -> None:
        plugin_data = SummaryMetadata.PluginData(plugin_name="hparams", content=data.SerializeToString())
        value = Summary.Value(tag=f"_hparams_/{name}", metadata=SummaryMetadata(plugin_data=plugin_data))
        self._write(Event(step=0, summary=Summary(value=[value])))

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        self._file.close()
