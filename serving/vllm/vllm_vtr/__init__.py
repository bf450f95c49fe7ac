"""Visual token pruning inside vLLM: a plug-in that changes nothing until `additional_config` has "vtr"."""


def register() -> None:
    """Register the plug-in; vLLM calls this in each of its processes, and may do so several times."""
    from vllm_vtr import configuration, families, metrics

    configuration.install()
    metrics.install()
    families.register()
