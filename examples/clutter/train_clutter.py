"""Train `clutter-llava` from scratch and write it in the original LLaVA-1.5 format."""

import clutter
import train_llava


class ClutterStudent(train_llava.LlavaStudent):
    """The student of the shapes world, which learns to read."""

    subject = clutter


if __name__ == "__main__":
    train_llava.main(ClutterStudent, __doc__, dense_steps=4500, answer_steps=3000)
