"""Write the 400 test questions of the clutter world, with their pictures, as the parquet file the task reads."""

from pathlib import Path

import clutter
import make_questions

SET = make_questions.TestSet(Path(__file__).parent / "tasks/clutter_test.parquet", 0, False, 72, clutter)

if __name__ == "__main__":
    make_questions.write([SET])
