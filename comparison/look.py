"""Ask one question unpruned and pruned, and draw what the strategy saw and what it left."""

import argparse
import sys
from pathlib import Path

from comparison.cli import add_options, load_evaluator, model_parser, take_options, unpruned_options
from comparison.pictures import draw
from strategy.config import VTRConfig
from strategy.evaluation.files import write_whole

SET_OTHERWISE = ("enabled",)
HOW = "since look asks the model both pruned and unpruned"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = model_parser(__doc__)
    parser.add_argument("--image", required=True, help="a picture; for videollava a video")
    parser.add_argument("--question", required=True, help="what to ask about it")
    parser.add_argument("--output", type=Path, default=Path("results/look.png"), help="the PNG to write")
    add_options(parser, SET_OTHERWISE)
    return parser.parse_args(arguments)


def main() -> None:
    """Ask the question, print both answers, and write the picture."""
    arguments = parse()
    try:
        given = take_options(arguments, SET_OTHERWISE, HOW)
        VTRConfig(**given)
        if arguments.output.suffix.lower() != ".png" or arguments.output.is_dir():
            raise ValueError(f"--output {arguments.output}: want the name of a PNG, such as results/look.png")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        evaluator = load_evaluator(arguments)
        unpruned = evaluator.inspect_one(arguments.image, arguments.question, unpruned_options(given))
        pruned = evaluator.inspect_one(arguments.image, arguments.question, given)
    except (ValueError, OSError) as error:
        sys.exit(f"look: {error}")
    name = " ".join(given.values()) or "pruned"
    answers = f"unpruned: {unpruned.answer}\n{name}: {pruned.answer}"
    write_whole(arguments.output, draw(pruned, f"{arguments.question}\n{answers}"))
    print(f"{answers}\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
