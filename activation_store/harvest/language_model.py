"""Which language model: what can be known from its files alone, and how to load it.

``resolve_model`` reads ``config.json`` and nothing heavier, so that a wrong name, hook or context length is refused
before torch is even imported. ``load_language_model`` then makes a TransformerLens ``TransformerBridge`` of the same
folder or hub name. The table of hooks below says, for every TransformerLens name we accept, which shape one token's
activation has; test_hooks_fire.py holds it against the Bridge on nineteen layouts.

Another kind of model can be added from outside: an entry point in the group ``dictlearn.language_models`` called, say,
``codebook`` makes names of the form ``codebook:ARGUMENT`` known (see ``Loader``).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from activation_store.devices import refuse_missing
from activation_store.errors import UserError
from activation_store.foreign import UNKNOWN_MODEL

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

BUNDLED_FOLDER = Path(__file__).parent / "bundled"
ENTRY_POINT_GROUP = "dictlearn.language_models"

WEIGHT_PROCESSING = {
    "fold_layer_norm": False,
    "center_writing_weights": False,
    "center_unembedding": False,
    "fold_value_biases": False,
}
"""``boot_transformers`` leaves the checkpoint's weights as they are; recorded in every store, and held by a test."""


# --- what is known without the weights ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSpec:
    """A language model as its ``config.json`` describes it.

    ``name`` finds it again: "bundled", the absolute path of a folder, or a hub name. Widths are in units of one number
    per token; ``d_mlp`` and ``n_ctx`` are None where the config does not say (then hooks of that width are refused, and
    any context is allowed).
    """

    name: str
    layout: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int | None
    vocab_size: int
    n_ctx: int | None
    bos_token_id: int | None
    features: frozenset[str]
    config_hash: str
    folder: Path | None = None
    revision: str | None = None
    loader: str = "transformers"

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the config and the weights; for a hub name, of the config and the revision (it fixes the weights)."""
        digest = hashlib.sha256(self.config_hash.encode())
        if self.folder is None:
            digest.update(str(self.revision).encode())
        else:
            for file in _weight_files(self.folder):
                digest.update(file.name.encode())
                with file.open("rb") as data:
                    while block := data.read(1 << 20):
                        digest.update(block)
        return "sha256:" + digest.hexdigest()

    def hook_shape(self, hook: str) -> tuple[int, ...]:
        """Shape of one token's activation at ``hook``.

        Raises:
            UserError: when this model has no such hook, naming the nearest; or when its activation cannot be a row.
        """
        site, layer = _match(hook)
        if site is None:
            raise UserError(self._unknown_hook(hook))
        if layer is not None and layer >= self.n_layers:
            raise UserError(
                f"There is no hook {hook!r}: {self.name} has {self.n_layers} layers, "
                f"numbered 0 to {self.n_layers - 1}{_nearest(hook, self.hooks())}."
            )
        if site.refused:
            raise UserError(f"The hook {hook!r} cannot be harvested: {site.refused.format(layer=layer)}.")
        if site.needs and site.needs not in self.features:
            raise UserError(f"{self._unknown_hook(hook)[:-1]} ({self.layout} models have no {site.needs}).")
        if "d_mlp" in site.axes and self.d_mlp is None:
            raise UserError(f"The width of {hook!r} cannot be told from the config of {self.name} ({self.layout}).")
        return tuple(getattr(self, axis) for axis in site.axes)

    def hooks(self) -> list[str]:
        """Every hook name this model accepts, in the order of the forward pass within a layer."""
        names: list[str] = []
        for site in SITES:
            if site.refused or (site.needs and site.needs not in self.features):
                continue
            if "d_mlp" in site.axes and self.d_mlp is None:
                continue
            layers = range(self.n_layers) if "{layer}" in site.pattern else (0,)
            names.extend(site.pattern.format(layer=layer) for layer in layers)
        return names

    def last_layer_needed(self, hooks: Sequence[str]) -> int:
        """The last block that must run to reach all ``hooks``: -1 for none, ``n_layers`` if the final norm must."""
        needed = [-1]
        for hook in hooks:
            site, layer = _match(hook)
            if layer is not None:
                needed.append(layer - 1 if site is not None and site.before_block else layer)
            elif site is not None and site.after_blocks:
                needed.append(self.n_layers)
        return max(needed)

    def parameters_per_layer(self) -> int:
        """Matrix weights of one block, for estimates of the work: 2 floating-point operations each per token."""
        attention = self.d_model * self.d_head * (2 * self.n_heads + 2 * self.n_kv_heads)
        matrices = 3 if "gated MLP" in self.features else 2
        return attention + matrices * self.d_model * (self.d_mlp or 4 * self.d_model)

    def provenance(self) -> dict[str, Any]:
        """What a store records of the model."""
        return {
            "name": self.name,
            "layout": self.layout,
            "fingerprint": self.fingerprint,
            "revision": self.revision,
            "weight_processing": WEIGHT_PROCESSING,
        }

    def _unknown_hook(self, hook: str) -> str:
        return f"{self.name} has no hook {hook!r}{_nearest(hook, self.hooks())}."


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors (one or in shards), or PyTorch's own format when there are none."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            return files
    raise UserError(
        f"The folder {str(folder)!r} has a config.json but no weights (*.safetensors or pytorch_model*.bin)."
    )


# --- hooks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A place in models of a kind. ``axes`` name the widths (attributes of ModelSpec) of one token's activation."""

    pattern: str
    axes: tuple[str, ...] = ("d_model",)
    needs: str | None = None
    refused: str | None = None
    before_block: bool = False
    after_blocks: bool = False


_PAIRS = (
    "it has one number per pair of positions, so its width changes with the context, and a row of a store is one "
    "position; harvest blocks.{layer}.attn.hook_z, which is what each head moves, and look at the patterns of single "
    "texts with TransformerLens' run_with_cache"
)
_OFF = "TransformerLens leaves it switched off; "
_HEADS, _KV_HEADS, _MLP = ("n_heads", "d_head"), ("n_kv_heads", "d_head"), ("d_mlp",)

SITES = (
    Site("hook_embed"),
    Site("embed.hook_out"),
    Site("hook_pos_embed", needs="learned positions"),
    Site("pos_embed.hook_out", needs="learned positions"),
    Site("blocks.{layer}.hook_resid_pre", before_block=True),
    Site("blocks.{layer}.hook_in", before_block=True),
    Site("blocks.{layer}.ln1.hook_in", needs="norm before attention"),
    Site("blocks.{layer}.ln1.hook_normalized", needs="norm before attention"),
    Site("blocks.{layer}.ln1.hook_out", needs="norm before attention"),
    Site("blocks.{layer}.attn.hook_in"),
    Site("blocks.{layer}.attn.hook_q", _HEADS),
    Site("blocks.{layer}.attn.q.hook_out", _HEADS),
    Site("blocks.{layer}.attn.hook_k", _KV_HEADS),
    Site("blocks.{layer}.attn.k.hook_out", _KV_HEADS),
    Site("blocks.{layer}.attn.hook_v", _KV_HEADS),
    Site("blocks.{layer}.attn.v.hook_out", _KV_HEADS),
    Site("blocks.{layer}.attn.hook_rot_q", _HEADS, needs="rotary positions"),
    Site("blocks.{layer}.attn.hook_rot_k", _KV_HEADS, needs="rotary positions"),
    Site("blocks.{layer}.attn.hook_z", _HEADS),
    Site("blocks.{layer}.attn.o.hook_in", _HEADS),
    Site("blocks.{layer}.attn.hook_out"),
    Site("blocks.{layer}.hook_attn_out"),
    Site("blocks.{layer}.hook_resid_mid", needs="residual stream between attention and MLP"),
    Site("blocks.{layer}.ln2.hook_in", needs="norm before the MLP"),
    Site("blocks.{layer}.ln2.hook_normalized", needs="norm before the MLP"),
    Site("blocks.{layer}.ln2.hook_out", needs="norm before the MLP"),
    Site("blocks.{layer}.mlp.hook_in"),
    Site("blocks.{layer}.mlp.hook_pre", _MLP, needs="single MLP in each layer"),
    Site("blocks.{layer}.mlp.hook_pre_linear", _MLP, needs="gated MLP"),
    Site("blocks.{layer}.mlp.hook_post", _MLP, needs="single MLP in each layer"),
    Site("blocks.{layer}.mlp.hook_out"),
    Site("blocks.{layer}.hook_mlp_out"),
    Site("blocks.{layer}.hook_out"),
    Site("blocks.{layer}.hook_resid_post"),
    Site("ln_final.hook_in", after_blocks=True),
    Site("ln_final.hook_normalized", after_blocks=True),
    Site("ln_final.hook_out", after_blocks=True),
    Site("blocks.{layer}.attn.hook_pattern", refused=_PAIRS),
    Site("blocks.{layer}.attn.hook_attn_scores", refused=_PAIRS),
    Site(
        "blocks.{layer}.attn.hook_result",
        refused=_OFF + "harvest blocks.{layer}.attn.hook_z and multiply by W_O, which is smaller by d_model/d_head",
    ),
    Site("blocks.{layer}.hook_mlp_in", refused=_OFF + "blocks.{layer}.mlp.hook_in is the MLP's input"),
    Site("blocks.{layer}.hook_attn_in", refused=_OFF + "blocks.{layer}.attn.hook_in is the attention's input"),
    Site("blocks.{layer}.hook_q_input", refused=_OFF + "blocks.{layer}.attn.hook_in is the attention's input"),
    Site("blocks.{layer}.hook_k_input", refused=_OFF + "blocks.{layer}.attn.hook_in is the attention's input"),
    Site("blocks.{layer}.hook_v_input", refused=_OFF + "blocks.{layer}.attn.hook_in is the attention's input"),
    Site(
        "hook_unembed", refused="it is as wide as the vocabulary; harvest ln_final.hook_out and apply the unembedding"
    ),
    Site(
        "unembed.hook_out",
        refused="it is as wide as the vocabulary; harvest ln_final.hook_out and apply the unembedding",
    ),
)
"""In the order of the forward pass, refused ones last."""

_BY_PATTERN = {site.pattern: site for site in SITES}


def _match(hook: str) -> tuple[Site | None, int | None]:
    """The site a hook name belongs to and its layer, None where it has none."""
    found = re.fullmatch(r"blocks\.(0|[1-9]\d{0,5})\.(.+)", hook, flags=re.ASCII)
    if found is None:
        return (None if "{" in hook else _BY_PATTERN.get(hook)), None
    return _BY_PATTERN.get("blocks.{layer}." + found[2]), int(found[1])


def _nearest(hook: str, known: list[str]) -> str:
    near = difflib.get_close_matches(hook, known, n=3, cutoff=0.4)
    return f"; the nearest are {', '.join(near)}" if near else f"; hooks look like {known[-4]}"


# --- layouts --------------------------------------------------------------------------------------------------------

_ROTARY = {"rotary positions"}
_PRE_NORMS = {"norm before attention", "norm before the MLP"}
_SEQUENTIAL = {"residual stream between attention and MLP"}
_LLAMA = frozenset(_ROTARY | _PRE_NORMS | _SEQUENTIAL | {"gated MLP", "single MLP in each layer"})
_GPT2 = frozenset(_PRE_NORMS | _SEQUENTIAL | {"learned positions", "single MLP in each layer"})

LAYOUTS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "stablelm"), _LLAMA),
    "phi3": _LLAMA - _ROTARY,  # its queries and keys are one matrix: the Bridge shows them before the rotation only
    "olmo2": _LLAMA - _PRE_NORMS,
    "mixtral": _LLAMA - {"gated MLP", "single MLP in each layer"},
    **dict.fromkeys(("gpt2", "gpt_neo", "opt"), _GPT2),
    "bloom": _GPT2 - {"learned positions"},
    "gpt_neox": frozenset({"norm before attention", "norm before the MLP", "single MLP in each layer"}),
    "gptj": frozenset({"norm before attention", "single MLP in each layer"}),
    "phi": frozenset({"norm before attention", "single MLP in each layer"} | _ROTARY),
    "falcon": frozenset({"norm before attention", "single MLP in each layer"}),
}
"""What a model type has, of what not every model type has. An unlisted type is taken to have everything; a hook that
then does not fire, or has another shape, is refused at the first batch."""

_EVERYTHING = frozenset(site.needs for site in SITES if site.needs)


def _first(config: dict[str, Any], *keys: str) -> Any:
    """The first of ``keys`` that the config gives a value."""
    return next((config[key] for key in keys if config.get(key) is not None), None)


def spec_from_config(name: str, config: dict[str, Any], config_hash: str, **where: Any) -> ModelSpec:
    """Read a Hugging Face config; ``where`` is passed on to ModelSpec (folder, revision, loader).

    Raises:
        UserError: when the config is not that of a decoder we can tell the widths of.
    """
    if isinstance(config.get("text_config"), dict):  # the language half of a multimodal model
        config = {**config, **config["text_config"]}
    layout = str(config.get("model_type", "unknown"))
    widths = {
        "n_layers": _first(config, "num_hidden_layers", "n_layer", "num_layers"),
        "d_model": _first(config, "hidden_size", "n_embd", "d_model"),
        "n_heads": _first(config, "num_attention_heads", "n_head", "num_heads"),
        "vocab_size": _first(config, "vocab_size"),
    }
    missing = [key for key, value in widths.items() if not isinstance(value, int) or value < 1]
    if missing or config.get("is_encoder_decoder"):
        reason = "is an encoder-decoder" if config.get("is_encoder_decoder") else f"gives no {', '.join(missing)}"
        raise UserError(f"The config of {name} ({layout}) {reason}; only decoder language models can be harvested.")
    d_model, n_heads = widths["d_model"], widths["n_heads"]
    n_kv_heads = _first(config, "num_key_value_heads")
    if layout == "falcon" and not config.get("new_decoder_architecture"):
        n_kv_heads = 1 if config.get("multi_query", True) else n_heads
    d_mlp = _first(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    if d_mlp is None and layout in ("gpt2", "gptj", "gpt_neo", "bloom", "falcon"):
        d_mlp = 4 * d_model
    features = LAYOUTS.get(layout, _EVERYTHING)
    if layout == "gpt_neox" and config.get("use_parallel_residual") is False:
        features |= _SEQUENTIAL
    bos_token_id = _first(config, "bos_token_id")
    if isinstance(bos_token_id, list):
        bos_token_id = bos_token_id[0]
    return ModelSpec(
        name=name,
        layout=layout,
        **widths,
        n_kv_heads=n_kv_heads or n_heads,
        d_head=_first(config, "head_dim") or d_model // n_heads,
        d_mlp=d_mlp,
        n_ctx=_first(config, "n_positions", "max_position_embeddings", "max_sequence_length", "seq_length"),
        bos_token_id=bos_token_id,
        features=features,
        config_hash=config_hash,
        **where,
    )


# --- finding a model by name ----------------------------------------------------------------------------------------


class Loader(Protocol):
    """Another kind of model, registered under an entry point of the group ``dictlearn.language_models``."""

    def resolve(self, argument: str) -> ModelSpec:
        """The model called ``NAME:argument``, without importing torch; ``ModelSpec.loader`` must be NAME."""

    def load(self, spec: ModelSpec, device: str, dtype: str) -> TransformerBridge:
        """The model itself, in evaluation mode."""

    def tokenizer(self, spec: ModelSpec) -> Tokenizer:
        """Its tokenizer."""


_registered: dict[str, Loader] = {}


def register_loader(name: str, loader: Loader) -> None:
    """Make ``name:ARGUMENT`` a model name in this process (an installed package uses the entry point instead)."""
    _registered[name] = loader


def find_loader(name: str) -> Loader | None:
    """The loader registered as ``name``, by ``register_loader`` or by an installed package."""
    if name not in _registered:
        from importlib.metadata import entry_points

        for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
            _registered[name] = point.load()
    return _registered.get(name)


POSSIBLE_NAMES = "a model is 'bundled', a folder in Hugging Face layout, or a hub name such as gpt2 or owner/model"


def resolve_model(name: str) -> ModelSpec:
    """What ``name`` is: "bundled", a local folder in Hugging Face layout, or a hub name. Imports no torch.

    Raises:
        UserError: when it is none of these, or its config cannot be had or understood.
    """
    if name == "bundled":
        return _resolve_folder("bundled", BUNDLED_FOLDER)
    if name == UNKNOWN_MODEL["name"]:
        raise UserError(
            "It is not known which language model the activations are of: they were imported from a file that does "
            "not say. What needs the model or its tokenizer cannot be done; import them again with --model to name it."
        )
    scheme, colon, argument = name.partition(":")
    if colon and (loader := find_loader(scheme)) is not None:
        return loader.resolve(argument)
    folder = Path(name).expanduser()
    if name and _is_folder(folder):
        return _resolve_folder(str(folder.resolve()), folder.resolve())
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name, flags=re.ASCII):
        return _resolve_hub(name)
    raise UserError(f"There is no model {name!r}: {POSSIBLE_NAMES}.")


def model_of(recorded: Mapping[str, Any], since: str) -> ModelSpec:
    """The model that a provenance records; an import may know it by name alone.

    Args:
        since: what has been made with it, as in "the store 's' was harvested from it".

    Raises:
        UserError: it is not there any more, or has changed.
    """
    spec = resolve_model(recorded["name"])
    if recorded["fingerprint"] not in (None, spec.fingerprint):
        raise UserError(
            f"The model {spec.name!r} has changed since {since} (its config or weights have another fingerprint); "
            "restore it, or harvest and train again."
        )
    return spec


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long for the file system, or with a null byte
        return False


def _resolve_folder(name: str, folder: Path) -> ModelSpec:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"The folder {str(folder)!r} holds no config.json, so it is no model in Hugging Face layout; "
            f"{POSSIBLE_NAMES}."
        )
    config, config_hash = _read_config(path, name)
    return spec_from_config(name, config, config_hash, folder=folder)


def _resolve_hub(name: str) -> ModelSpec:
    path = _hub_file(name, "config.json")
    config, config_hash = _read_config(path, name)
    return spec_from_config(name, config, config_hash, revision=path.parent.name)


def _hub_file(name: str, file: str, revision: str | None = None) -> Path:
    """A file of a hub repository, from the cache or the network; its folder is named after the commit."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(hf_hub_download(name, file, revision=revision, etag_timeout=3))
    except HFValidationError as error:
        raise UserError(f"There is no model {name!r}: {POSSIBLE_NAMES}.") from error
    except GatedRepoError as error:
        raise UserError(
            f"The model {name!r} is gated: accept its licence on the hub and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"There is no model {name!r} on the hub and no folder of that name: {POSSIBLE_NAMES}."
        ) from error
    except Exception as error:  # offline, no cache, no network, a proxy: the library has a class for each
        reason = (
            "hub access is switched off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        )
        raise UserError(
            f"{file} of the model {name!r} is neither in the local cache nor to be had, because {reason}; "
            f"{POSSIBLE_NAMES}."
        ) from error


def _read_config(path: Path, name: str) -> tuple[dict[str, Any], str]:
    data = path.read_bytes()
    try:
        config = json.loads(data)
    except ValueError as error:
        raise UserError(f"The config.json of {name} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"The config.json of {name} holds a {type(config).__name__} where an object is expected.")
    return config, "sha256:" + hashlib.sha256(data).hexdigest()


# --- the tokenizer --------------------------------------------------------------------------------------------------


def load_tokenizer(spec: ModelSpec) -> Tokenizer:
    """The model's tokenizer, by the ``tokenizers`` library alone (its ``tokenizer.json``)."""
    from tokenizers import Tokenizer

    if spec.loader != "transformers":
        return _loader_of(spec).tokenizer(spec)
    path = _tokenizer_file(spec)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"The tokenizer.json of {spec.name} cannot be read: {error}.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()  # a file may carry a limit of 512 tokens that would silently drop the rest of a text
    return tokenizer


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of everything that decides which tokens a text becomes."""
    return "sha256:" + hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def _tokenizer_file(spec: ModelSpec) -> Path:
    if spec.folder is None:
        return _hub_file(spec.name, "tokenizer.json", spec.revision)
    path = spec.folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"The model folder {str(spec.folder)!r} has no tokenizer.json; save its fast tokenizer there with "
            "transformers' save_pretrained."
        )
    return path


def _loader_of(spec: ModelSpec) -> Loader:
    loader = find_loader(spec.loader)
    if loader is None:
        raise UserError(
            f"The model {spec.name} is of the kind {spec.loader!r}, which nothing installed here can load "
            f"(entry points of the group {ENTRY_POINT_GROUP})."
        )
    return loader


# --- loading --------------------------------------------------------------------------------------------------------


def load_language_model(spec: ModelSpec, device: str = "cpu", dtype: str = "float32") -> TransformerBridge:
    """The model as a TransformerBridge with the checkpoint's own weights, in evaluation mode, without gradients.

    A local or bundled model is loaded without any access to the hub. Takes 6 to 10 s the first time in a process,
    nearly all of it imports.

    Raises:
        UserError: when the device is not there, or TransformerLens cannot load the model.
    """
    if spec.loader != "transformers":
        return _loader_of(spec).load(spec, device, dtype)
    import torch

    refuse_missing(device)
    with _quiet(), _local_only(spec.folder is not None):
        from transformer_lens.model_bridge import TransformerBridge

        try:
            bridge = TransformerBridge.boot_transformers(
                spec.name if spec.folder is None else str(spec.folder),
                device=device,
                dtype=getattr(torch, dtype),
                revision=spec.revision,
            )
        except (
            Exception
        ) as error:  # whatever transformers, safetensors or the Bridge raise for a model they cannot read
            raise UserError(
                f"TransformerLens cannot load {spec.name} ({spec.layout}): {str(error).strip().splitlines()[0]}"
            ) from error
    bridge.eval()
    bridge.requires_grad_(False)
    return bridge


def load_modules(
    spec: ModelSpec, model_class: type[PreTrainedModel], device: str = "cpu", dtype: str = "float32"
) -> PreTrainedModel:
    """The model as transformers itself loads it, with the attention it finds best, in evaluation mode, no gradients.

    ``model_class`` is that of the model inside the Bridge; the weights are the same, read from the same files. Where a
    GELU is written out as tanh and powers, each of them a pass over memory, torch's own takes its place: a GPT-2 runs
    1.2 to 1.4 times as fast on a CPU, as much as torch.compile makes of it.
    """
    import torch

    with _quiet(), _local_only(spec.folder is not None):
        model = model_class.from_pretrained(
            spec.name if spec.folder is None else str(spec.folder),
            dtype=getattr(torch, dtype),
            revision=spec.revision or "main",
        )
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ in WRITTEN_OUT_GELUS:
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval().requires_grad_(False)


WRITTEN_OUT_GELUS = ("NewGELUActivation", "FastGELUActivation", "BloomGelu")
"""Classes of transformers that compute 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers and TransformerLens from printing warnings and progress bars while a model loads."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            from transformers.utils import logging as transformers_logging

            bars = transformers_logging.is_progress_bar_enabled()
            transformers_logging.disable_progress_bar()
            try:
                yield
            finally:
                if bars:
                    transformers_logging.enable_progress_bar()
        finally:
            logging.disable(previous)


@contextmanager
def _local_only(local: bool) -> Iterator[None]:
    """For a model on disk, switch hub access off: loading a folder must not ask the network about its tokenizer."""
    from huggingface_hub import constants

    previous = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = previous or local
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = previous
