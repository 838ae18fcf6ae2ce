"""Bytes of a folder of bases under a coverage-guided fuzzer: `make fuzz` runs it.

    python tests/robustness/atheris_loader.py -runs=10000

Every input is a folder's configuration or weights, as atheris mutates them. It ends in an `EigenAttnError` of one line,
or in a model whose maps are finite and no larger than its ranks allow; anything else stops the fuzzer.
"""

import copy
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["eigenattn"]):
    import eigenattn
    from eigenattn import EigenAttentionConfig, EigenAttnError, compress
    from eigenattn.models.bases_file import BASES_FILE, CONFIG_FILE, save_bases

from tiny import HEAD_DIM, tiny, tokens

from eigenattn.models.conversion import eigen_layers
from eigenattn.models.maps import MAPS

KV_HEADS = 2
FILES = (CONFIG_FILE, BASES_FILE)


def main() -> None:
    original, compressed = tiny("llama"), tiny("llama")
    config = EigenAttentionConfig(kv_ratio=0.5, rank_multiple=2, window=4, ranks="uniform")
    compress(compressed, [tokens(2, 40)], config)
    with tempfile.TemporaryDirectory() as temporary:
        folder, seeds = Path(temporary, "bases"), Path(temporary, "seeds")
        folder.mkdir()
        seeds.mkdir()
        save_bases(compressed, folder)
        valid = {name: (folder / name).read_bytes() for name in FILES}
        for number, name in enumerate(FILES):
            (seeds / name).write_bytes(bytes([number]) + valid[name])

        def attempt(data: bytes) -> None:
            """The first byte says which file the others are."""
            for number, name in enumerate(FILES):
                (folder / name).write_bytes(data[1:] if data[:1] == bytes([number]) else valid[name])
            model = copy.deepcopy(original)
            try:
                eigenattn.attach(model, folder)
            except EigenAttnError as error:
                assert "\n" not in str(error), error
                return
            for attention in eigen_layers(model):
                maps = [getattr(attention, name) for name in MAPS if getattr(attention, name) is not None]
                assert all(each.isfinite().all() and each.numel() <= (KV_HEADS * HEAD_DIM) ** 2 for each in maps)

        # libFuzzer ends the process itself, so that the folder is left to the system's temporary files.
        atheris.Setup([*sys.argv, "-len_control=0", f"-max_len={len(valid[BASES_FILE]) + 1000}", str(seeds)], attempt)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
