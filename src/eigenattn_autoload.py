"""Has transformers load compressed models in programs that never import `eigenattn`.

PyTorch calls `autoload` at the end of `import torch` (entry point of the group `torch.backends`). It only puts a finder
before Python's own. When transformers' loader is imported, stand-ins are registered, and the package itself is imported
when there is something compressed to load. Nothing here may raise, or take time: it runs in everybody's programs.
`EIGENATTN_AUTOLOAD=0` switches it off, and so does PyTorch's `TORCH_DEVICE_BACKEND_AUTOLOAD=0`.
"""

import functools
import os
import sys

METHOD = "eigenattn"
QUANTISERS, MODELS = "transformers.quantizers.auto", "transformers.modeling_utils"
SWITCH, BASES = "EIGENATTN_AUTOLOAD", "EIGENATTN_BASES"


def _package():
    """The package, which puts itself in the place of the stand-ins."""
    try:
        import eigenattn
    except Exception as error:
        raise ImportError(
            f"this model is compressed by eigenattn, whose installation is broken ({type(error).__name__}: {error}): "
            "install it again, or load the original model."
        ) from error
    return eigenattn


def serve():
    """The plug-in for vLLM, `eigenattn.vllm.register`.

    vLLM goes on without a plug-in that cannot be imported, and would serve uncompressed: where bases are asked for it
    is stopped here, as far as that can be seen from outside.
    """
    try:
        from eigenattn.vllm import register

        register()
    except Exception as error:
        told = f"eigenattn's plug-in for vLLM is broken ({type(error).__name__}: {error}): install it again"
        if os.environ.get(BASES) or any(METHOD in argument for argument in sys.argv[1:]):
            raise ImportError(f"{told}, or leave out the bases.") from error
        print(f"{told}. Nothing compressed is served.", file=sys.stderr)


class _Config:
    """Stands in for the configuration of a compressed checkpoint until there is one to read."""

    @staticmethod
    def from_dict(config_dict, **kwargs):
        _package()
        return sys.modules[QUANTISERS].AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD].from_dict(config_dict, **kwargs)


def _quantiser(config, **kwargs):
    """Stands in for the quantiser; a configuration of ours has put the real one in its place already."""
    _package()
    return sys.modules[QUANTISERS].AUTO_QUANTIZER_MAPPING[METHOD](config, **kwargs)


def _register(module):
    module.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, _Config)
    module.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, _quantiser)


def _follow(module):
    """Have `from_pretrained` go on with the base model where it is given a folder of bases."""
    original = vars(module.PreTrainedModel)["from_pretrained"].__func__
    if getattr(original, "__module__", None) == __name__:
        return

    @functools.wraps(original)
    def from_pretrained(cls, *args, **kwargs):
        told = getattr(kwargs.get("config"), "quantization_config", None)
        bases = told if isinstance(told, dict) and told.get("quant_method") == METHOD and told.get("base") else None
        if bases is None:
            try:
                return original(cls, *args, **kwargs)
            except Exception as error:  # without a configuration it finds out on the way
                bases = getattr(error, "eigenattn_bases", None)
                if bases is None:
                    raise
        _package()
        from eigenattn.models.loading import load_bases

        return load_bases(bases, cls, *args, **kwargs)

    from_pretrained.__module__ = __name__
    module.PreTrainedModel.from_pretrained = classmethod(from_pretrained)


ACTIONS = {QUANTISERS: _register, MODELS: _follow}


class _Loader:
    """Loads a module as its own loader does, and then acts on it."""

    def __init__(self, own):
        self.own = own

    def create_module(self, spec):
        return self.own.create_module(spec)

    def exec_module(self, module):
        self.own.exec_module(module)
        _act(module)

    def __getattr__(self, name):
        return getattr(self.own, name)


class _Finder:
    """Finds what the finders behind it find."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in ACTIONS:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


def _act(module):
    try:
        ACTIONS[module.__name__](module)
    except Exception as error:  # of a transformers to come
        print(f"eigenattn: compressed models need `import eigenattn` here ({error!r}).", file=sys.stderr)


def autoload():
    """The entry point."""
    if os.environ.get(SWITCH) != "0":
        watch()


def watch():
    """Act on what is imported already, and look out for the rest."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in ACTIONS:
        if name in sys.modules and not _is_loading(sys.modules[name]):
            _act(sys.modules[name])


def _is_loading(module):
    return getattr(getattr(module, "__spec__", None), "_initializing", False)
