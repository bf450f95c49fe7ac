"""The file of answers: written line by line, resumed after a kill, never mixed between runs."""

import glob
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from strategy.evaluation.append_log import AppendOnlyLog, acquire_lock
from strategy.evaluation.files import write_whole
from strategy.evaluation.resume import differing
from videollava.eval.video.questions import LeftOut, Sample


class AnswerFile:
    """One run's answers, one JSON object a line (id, question, answer, pred, and type where the data has one).

    Beside NAME.json lie NAME.settings.json, with the settings and whether the run is complete; NAME.left_out.json, with
    what could not be answered; and NAME.lock.

    Args:
        folder: Where the files lie; it is made if it is missing.
        name: NAME.
        settings: What must not change between two runs that write the same file, by name.

    Attributes:
        done: The answers so far, by the key of their question.

    Raises:
        ValueError: Another run is writing the file, its settings are others or unknown, or it is damaged.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{name}.json"
        self.settings_file, self.left_out_file = (folder / f"{name}.{kind}.json" for kind in ("settings", "left_out"))
        self.settings = json.loads(json.dumps(settings))
        self._lock_file = folder / f"{name}.lock"
        refusal = f"{self.file}: another run is writing it; wait for it, or give another name"
        self._lock = acquire_lock(self._lock_file, refusal)
        try:
            self._check_settings()
            self._log = AppendOnlyLog(self.file, _parse)
        except BaseException:
            self._lock.release()
            raise
        self.done = dict(self._log.values)

    def _check_settings(self) -> None:
        if self.settings_file.exists():
            before = json.loads(self.settings_file.read_text())["settings"]
            if changes := differing(before, self.settings):
                raise ValueError(
                    f"{self.file} was begun with other settings ({'; '.join(changes)}): give another --output_name"
                )
        elif self.file.exists():
            raise ValueError(f"{self.file} is there, but not its settings: give another --output_name, or remove it")
        self._mark(complete=False)

    def _mark(self, complete: bool) -> None:
        _write_json(self.settings_file, {"complete": complete, "settings": self.settings})

    def add(self, sample: Sample, pred: str) -> None:
        """Write one answer; it is on disk when this returns."""
        entry = {"id": sample.id, "question": sample.question, "answer": sample.answer, "pred": pred}
        if sample.type is not None:
            entry["type"] = sample.type
        self._add_entries({sample.key: entry})

    def _add_entries(self, entries: dict[str, dict[str, Any]]) -> None:
        self._log.append(entries.values())
        self.done |= entries

    def merge_ranks(self) -> None:
        """Move the answers of other ranks, of this run or of one that was stopped, from their files into this one.

        Raises:
            ValueError: A rank is still running, or its settings were others.
        """
        for settings_file in sorted(self.file.parent.glob(f"{glob.escape(self.file.stem)}.rank*.settings.json")):
            part = AnswerFile(self.file.parent, settings_file.name.removesuffix(".settings.json"), self.settings)
            self._add_entries({key: entry for key, entry in part.done.items() if key not in self.done})
            part.close()
            # The settings go last, since the other files are found by them.
            for file in (part.file, part._lock_file, settings_file):
                file.unlink(missing_ok=True)

    def finish(self, samples: list[Sample], left_out: list[LeftOut]) -> None:
        """Sort the file in the order of the samples, list what was left out, and mark the run complete."""
        self._log.close()
        entries = [self.done[sample.key] for sample in samples if sample.key in self.done]
        write_whole(self.file, "".join(json.dumps(entry) + "\n" for entry in entries).encode())
        _write_json(self.left_out_file, [asdict(item) for item in left_out])
        self._mark(complete=True)

    def close(self) -> None:
        """Close the file and release its lock."""
        self._log.close()
        self._lock.release()


def _parse(entry: Any) -> tuple[str, dict[str, Any]]:
    """Return the key and the entry of a line."""
    return str(entry["id"]), entry


def _write_json(file: Path, value: Any) -> None:
    write_whole(file, (json.dumps(value, indent=2) + "\n").encode())


def rank_name(name: str, rank: int) -> str:
    """Return the name of a rank's files; those of rank 0 have the name of the run."""
    return f"{name}.rank{rank}" if rank else name


def chunk_name(name: str, count: int, number: int) -> str:
    """Return the name of a chunk's files."""
    return name if count == 1 else f"{name}_{count}_{number}"


def merge(folder: Path, name: str, count: int) -> Path | None:
    """Join the chunks of a run into the file that one run writes, once all are complete; return None until then."""
    chunks = [chunk_name(name, count, number) for number in range(count)]
    for part in chunks:
        settings = folder / f"{part}.settings.json"
        if not settings.exists() or not json.loads(settings.read_text())["complete"]:
            return None
    answers = [(folder / f"{part}.json").read_bytes() for part in chunks]
    write_whole(folder / f"{name}.json", b"".join(answers))
    left_out = [item for part in chunks for item in json.loads((folder / f"{part}.left_out.json").read_text())]
    _write_json(folder / f"{name}.left_out.json", left_out)
    return folder / f"{name}.json"
