"""The file of answers: written line by line, taken up again after a kill, never mixed between runs."""

import glob
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from videollava.eval.video.questions import LeftOut, Sample


def write_whole(file: Path, text: str) -> None:
    """Replace a file at once, so that nobody ever reads half of it."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.replace(file)


class AnswerFile:
    """One run's answers, one JSON object a line (id, question, answer, pred, and type where there is one).

    Beside it lie NAME.settings.json, what the run was asked to do and whether it is complete;
    NAME.left_out.json, what could not be answered; and a lock. Raises ValueError if another run is writing
    the file, if it was begun with other settings, or if it is damaged beyond its last line.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{name}.json"
        self.settings_file, self.left_out_file = (folder / f"{name}.{kind}.json" for kind in ("settings", "left_out"))
        self.settings = json.loads(json.dumps(settings))
        self.lock = FileLock(folder / f"{name}.lock", timeout=0)
        try:
            self.lock.acquire()
        except Timeout:
            raise ValueError(f"{self.file}: another run is writing it; wait for it, or give another name") from None
        self._check_settings()
        self.done = self._read()
        self.stream = self.file.open("a")

    def _check_settings(self) -> None:
        if self.settings_file.exists():
            before = json.loads(self.settings_file.read_text())["settings"]
            changed = [name for name in self.settings if before.get(name) != self.settings[name]]
            if changed:
                told = "; ".join(f"{name} was {before.get(name)!r}, is {self.settings[name]!r}" for name in changed)
                raise ValueError(f"{self.file} was begun with other settings ({told}): give another --output_name")
        elif self.file.exists():
            raise ValueError(f"{self.file} is there, but not its settings: give another --output_name, or remove it")
        self._mark(complete=False)

    def _mark(self, complete: bool) -> None:
        write_whole(self.settings_file, json.dumps({"complete": complete, "settings": self.settings}, indent=2) + "\n")

    def _read(self) -> dict[str, dict[str, Any]]:
        """The answers there already, by id; a last line that a kill cut off is dropped from the file."""
        if not self.file.exists():
            return {}
        data = self.file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            os.truncate(self.file, len(whole))
        try:
            entries = [json.loads(line) for line in whole.decode().splitlines()]
            return {str(entry["id"]): entry for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.file}: damaged ({error}): remove it, and the run begins anew") from error

    def add(self, sample: Sample, pred: str) -> None:
        """Write one answer; it is on disk when this returns."""
        entry = {"id": sample.id, "question": sample.question, "answer": sample.answer, "pred": pred}
        if sample.type is not None:
            entry["type"] = sample.type
        self._write([entry])

    def _write(self, entries: list[dict[str, Any]]) -> None:
        self.stream.writelines(json.dumps(entry) + "\n" for entry in entries)
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.done |= {str(entry["id"]): entry for entry in entries}

    def take_in(self) -> None:
        """Move here the answers of ranks, which lie beside it, from this run or one that was stopped.

        Raises ValueError if one of them is still at work, or worked with other settings.
        """
        for found in sorted(self.file.parent.glob(f"{glob.escape(self.file.stem)}.rank*.settings.json")):
            part = AnswerFile(found.parent, found.name.removesuffix(".settings.json"), self.settings)
            self._write([entry for key, entry in part.done.items() if key not in self.done])
            part.close()
            # The settings go last: without them nobody would look for what else is left.
            for file in (part.file, Path(part.lock.lock_file), part.settings_file):
                file.unlink(missing_ok=True)

    def finish(self, samples: list[Sample], left_out: list[LeftOut]) -> None:
        """Bring the file into the order of the samples, list what was left out, and mark the run complete."""
        self.stream.close()
        ordered = [self.done[sample.key] for sample in samples if sample.key in self.done]
        write_whole(self.file, "".join(json.dumps(entry) + "\n" for entry in ordered))
        write_whole(self.left_out_file, json.dumps([asdict(item) for item in left_out], indent=2) + "\n")
        self._mark(complete=True)

    def close(self) -> None:
        """Let go of the file."""
        self.stream.close()
        self.lock.release()


def rank_name(name: str, rank: int) -> str:
    """The name of a rank's files; the first rank's are those of the run."""
    return f"{name}.rank{rank}" if rank else name


def chunk_name(name: str, count: int, number: int) -> str:
    """The name of a chunk's files."""
    return name if count == 1 else f"{name}_{count}_{number}"


def merge(folder: Path, name: str, count: int) -> Path | None:
    """Join the chunks of a run into the file that one run writes, once all are complete; None until then."""
    chunks = [chunk_name(name, count, number) for number in range(count)]
    for part in chunks:
        settings = folder / f"{part}.settings.json"
        if not settings.exists() or not json.loads(settings.read_text())["complete"]:
            return None
    for kind in ("", ".left_out"):
        texts = [(folder / f"{part}{kind}.json").read_text() for part in chunks]
        joined = "".join(texts) if not kind else json.dumps([i for t in texts for i in json.loads(t)], indent=2) + "\n"
        write_whole(folder / f"{name}{kind}.json", joined)
    return folder / f"{name}.json"
