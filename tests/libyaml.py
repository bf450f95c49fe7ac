"""Let PyYAML read by libyaml: lmms-eval reads 3,000 files at its start, which takes 1 s in place of 8.

Import this before lmms-eval is used. As a script, it runs lmms-eval with the arguments given.
"""

import runpy

import yaml


class Loader(yaml.CFullLoader):
    """Keeps the name of the file that it reads, for which lmms-eval asks PyYAML's own loader."""

    def __init__(self, stream):
        super().__init__(stream)
        self.name = getattr(stream, "name", "<file>")


yaml.FullLoader = yaml.loader.FullLoader = Loader

if __name__ == "__main__":
    runpy.run_module("lmms_eval", run_name="__main__", alter_sys=True)
