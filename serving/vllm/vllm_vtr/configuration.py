"""What `additional_config={"vtr": {...}}` means, and which other settings of vLLM go with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from strategy import Facts, Plan, Strategy, VTRConfig, registry
from vllm_vtr import versions
from vllm_vtr.families import FAMILIES, PREFIX, ends_with_text, family_of, num_visual_tokens

KEY = "vtr"
NOMINAL_TOKENS = 576  # what a budget in tokens is counted against, as everywhere in this project
# Options of the project's own engine, whose place vLLM takes.
NOT_HERE = ("engine", "enabled")
NO_FLASHINFER = "FlashInfer is not supported: give attention_backend=FLASH_ATTN"

logger = init_logger("vllm.vtr")


@dataclass(frozen=True)
class Pruning:
    """What is pruned in an engine; the scheduler and the workers derive the same.

    Attributes:
        strategy: Selects the visual tokens.
        plan: Where it prunes, and how much it keeps.
        longest: The longest prompt, in tokens, that is prefilled whole; longer ones are answered unpruned.
    """

    strategy: Strategy
    plan: Plan
    longest: int

    def evicted(self, prompt: int, features: Sequence[Any], sampling: Any) -> int:
        """Return how many tokens the cache does not keep of a prompt.

        Args:
            prompt: How many tokens it has.
            features: vLLM's features of its pictures and videos.
            sampling: vLLM's parameters of its answer, or None.
        """
        visual = num_visual_tokens(features)
        if not visual:
            return 0
        if sampling is not None and sampling.prompt_logprobs is not None:
            logger.warning_once("vtr: a prompt whose log probabilities are asked for is answered unpruned.")
            return 0
        if prompt > self.longest:
            logger.warning_once(
                "vtr prunes prompts of up to %d tokens, which are prefilled whole; longer ones are answered unpruned: "
                "raise max_num_batched_tokens (and long_prefill_token_threshold, if it is set).",
                self.longest,
            )
            return 0
        if not ends_with_text(prompt, features):
            logger.warning_once("vtr: a prompt that ends with its picture asks nothing, and is answered unpruned.")
            return 0
        return visual - self.plan.kept(visual)[-1]


def asked(vllm_config: VllmConfig) -> dict[str, Any] | None:
    """Return the options that a user gave under "vtr"; None if pruning is not asked for."""
    extra = vllm_config.additional_config
    return extra.get(KEY) if isinstance(extra, dict) else None


def pruning_of(vllm_config: VllmConfig) -> Pruning:
    """Return what is pruned with a configuration that asks for it.

    Raises:
        ValueError: The options do not fit the strategy or the decoder.
    """
    text, scheduler = vllm_config.model_config.hf_text_config, vllm_config.scheduler_config
    given = asked(vllm_config)
    if not isinstance(given, dict):
        raise ValueError(f'vtr={given!r}: give a mapping, such as {{"strategy": "clse", "keep_tokens": 192}}')
    for name in NOT_HERE:
        if name in given:
            raise ValueError(f"vtr: {name}={given[name]!r}: vLLM runs the model here, so leave {name} out")
    limits = [scheduler.max_num_batched_tokens, scheduler.long_prefill_token_threshold]
    family = family_of(vllm_config.model_config.hf_config)
    options = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in given.items())
    return _pruning(options, facts(text, family.own_size), min(limit for limit in limits if limit > 0))


@lru_cache(maxsize=8)
def _pruning(options: tuple[tuple[str, Any], ...], facts: Facts, longest: int) -> Pruning:
    try:
        config = VTRConfig(**dict(options))
        strategy = registry.get(config.strategy)(config)
        plan = strategy.plan(facts)
    except ValueError as error:
        raise ValueError(f"vtr: {error}") from error
    if strategy.clip_text is not None:
        raise ValueError(
            f"vtr: clip_text={strategy.clip_text!r}: vLLM has no text tower of CLIP beside the model; omit clip_text"
        )
    return Pruning(strategy, plan, longest)


def facts(text: Any, own_size: bool) -> Facts:
    """Return what a strategy may know of a decoder, from its configuration in transformers' terms."""
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    token = text.hidden_size * (2 * width * (heads + keys) + 3 * text.intermediate_size)
    return Facts(text.num_hidden_layers, NOMINAL_TOKENS, own_size, pair_cost=2 * width * heads / token)


def install() -> None:
    """Let vLLM call `configure` when it has read a configuration."""

    def configuring(stock: Callable[[VllmConfig], None]) -> Callable[[VllmConfig], None]:
        def verify_and_configure(self: VllmConfig) -> None:
            # vLLM makes a configuration anew for parts of a model, and marks those that it has gone through.
            new = self.model_config is not None and not getattr(self.model_config, "config_updated", False)
            stock(self)
            if new and asked(self) is not None:
                configure(self)

        return verify_and_configure

    versions.wrap_once(VllmConfig, "try_verify_and_update_config", configuring)


def configure(vllm_config: VllmConfig) -> None:
    """Check a configuration that asks for pruning, and switch its model and scheduler to those that prune.

    Raises:
        ValueError: Something in the configuration does not go with pruning; the error says what to change.
    """
    model = vllm_config.model_config
    [architecture, *_] = model.hf_config.architectures or [None]
    if architecture not in FAMILIES:
        raise ValueError(f"vtr: {architecture} is not a model that is pruned; these are: {', '.join(FAMILIES)}")
    versions.check()
    pruning = pruning_of(vllm_config)
    for reason in refusals(vllm_config, pruning.strategy):
        raise ValueError(f"vtr: {reason}")
    model.hf_config.architectures = [PREFIX + architecture]
    vllm_config.scheduler_config.scheduler_cls = "vllm_vtr.scheduler.create"
    if vllm_config.cache_config.enable_prefix_caching:
        vllm_config.cache_config.enable_prefix_caching = False
        logger.info("vtr turns prefix caching off: what stays of a prompt depends on its end.")
    plan, config = pruning.plan, pruning.strategy.config
    budgets = ", ".join(f"{budget:g}" for budget in plan.budgets)
    logger.info(
        "vtr prunes %s by strategy=%s behind layers %s of %d, to %s %s; prompts of up to %d tokens.",
        architecture,
        config.strategy,
        ", ".join(str(layer - 1) for layer in plan.layers),
        model.hf_text_config.num_hidden_layers,
        budgets,
        "of their visual tokens" if plan.shares else "visual tokens",
        pruning.longest,
    )


def refusals(vllm_config: VllmConfig, strategy: Strategy) -> list[str]:
    """Return what of a configuration does not go with pruning by a strategy: a sentence each."""
    parallel, model, compilation = (
        vllm_config.parallel_config,
        vllm_config.model_config,
        vllm_config.compilation_config,
    )
    looks = f"{strategy.config.strategy} looks at what the vision tower saw"
    multimodal, heads = model.multimodal_config, getattr(model.hf_text_config, "num_key_value_heads", None)
    tensor = parallel.tensor_parallel_size
    found = {
        "pipeline_parallel_size > 1 is not supported: split the model by tensor_parallel_size": (
            parallel.pipeline_parallel_size > 1
        ),
        "context parallelism is not supported: leave it out": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        f"tensor_parallel_size={tensor} copies the {heads} key heads: choose a divisor of {heads}": (
            heads is not None and heads % tensor != 0
        ),
        "speculative decoding is not supported: leave speculative_config out": bool(vllm_config.speculative_config),
        "LoRA is not supported: merge the adapter into the weights": bool(vllm_config.lora_config),
        "KV connectors are not supported: leave kv_transfer_config out": bool(vllm_config.kv_transfer_config),
        "encoder cache connectors are not supported: leave ec_transfer_config out": bool(
            vllm_config.ec_transfer_config
        ),
        "sliding windows are not supported: choose another model, or disable_sliding_window": bool(
            model.get_sliding_window()
        ),
        "video_pruning_rate prunes videos already: leave one of the two out": bool(
            multimodal and multimodal.video_pruning_rate
        ),
        "a scheduler_cls of your own does not go with vtr's: leave one of the two out": bool(
            vllm_config.scheduler_config.scheduler_cls
        ),
        "cudagraph_mode=FULL runs prompts as graphs, which pruning cannot: use FULL_AND_PIECEWISE": (
            compilation.cudagraph_mode == CUDAGraphMode.FULL
        ),
        f"{looks}, whose heads tensor_parallel_size={tensor} splits: use data_parallel_size, or another strategy": (
            strategy.encoder_layer is not None and tensor > 1
        ),
        f"{looks}, which a compiled or captured tower does not show: leave compile_mm_encoder and cudagraph_mm_encoder "
        "out": strategy.encoder_layer is not None
        and (compilation.compile_mm_encoder or compilation.cudagraph_mm_encoder),
        "Model Runner V1 is not supported: set VLLM_USE_V2_MODEL_RUNNER=1": not vllm_config.use_v2_model_runner,
        NO_FLASHINFER: vllm_config.attention_config.backend == AttentionBackendEnum.FLASHINFER,
    }
    return [reason for reason, applies in found.items() if applies]
