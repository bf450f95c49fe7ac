"""Ask one question unpruned and pruned, and draw what the strategy saw and what it left."""

import sys
from pathlib import Path

from comparison.command import add_knobs, evaluator, parser
from comparison.pictures import draw
from strategy.config import VTRConfig, field_names
from strategy.evaluation.files import write_whole


def main() -> None:
    """Look, print both answers, and write the picture."""
    made = parser(__doc__)
    made.add_argument("--image", required=True, help="a picture; for videollava a video")
    made.add_argument("--question", required=True, help="what to ask about it")
    made.add_argument("--output", type=Path, default=Path("results/look.png"), help="the PNG to write")
    add_knobs(made)
    options = made.parse_args()
    knobs = {name: getattr(options, name) for name in field_names() if hasattr(options, name)}
    try:
        VTRConfig(**knobs)
        if options.output.suffix.lower() != ".png" or options.output.is_dir():
            raise ValueError(f"--output {options.output}: want the name of a PNG, such as results/look.png")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        asked = evaluator(options)
        unpruned = asked.look(options.image, options.question, {"enabled": False})
        pruned = asked.look(options.image, options.question, knobs)
    except (ValueError, OSError) as error:
        sys.exit(f"look: {error}")
    name = " ".join(knobs.values()) or "pruned"
    answers = f"unpruned: {unpruned.answer}\n{name}: {pruned.answer}"
    write_whole(options.output, draw(pruned, f"{options.question}\n{answers}"))
    print(f"{answers}\nwritten to {options.output}")


if __name__ == "__main__":
    main()
