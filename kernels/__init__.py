"""Operations on tensors for language-model refinement; they know nothing of models, requests or the engine.

Every operation has a plain PyTorch reference (``impl="torch"``) and faster implementations behind the same function;
``impl="auto"`` picks by device and layout. Nothing happens at import: the C++ library is loaded at the first call.
"""

if __name__ == "kernels":
    # The checkout is on sys.path and transformers looks for Hugging Face's package of this name: hand over to it, or be
    # an empty module without a version, which counts as not installed.
    import importlib.machinery
    import importlib.util
    import os
    import sys

    _checkout = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    _elsewhere = [path for path in sys.path if os.path.realpath(path) != _checkout]
    _theirs = importlib.machinery.PathFinder.find_spec(__name__, _elsewhere)
    if _theirs is not None and _theirs.loader is not None:
        sys.modules[__name__] = importlib.util.module_from_spec(_theirs)
        _theirs.loader.exec_module(sys.modules[__name__])
else:
    from engine.kernels.consistency_loss import ConsistencyLoss, ConsistencyLossOutput, LossStats, consistency_loss
    from engine.kernels.gated_activation import gated_activation
    from engine.kernels.jacobi_accept import jacobi_accept
    from engine.kernels.jacobi_pack import jacobi_pack
    from engine.kernels.jacobi_state import Field, JacobiState, NoiseRows, PackedRows, Phase, Rate
    from engine.kernels.linear import LinearWeight, embedding, linear
    from engine.kernels.linear_argmax import linear_argmax
    from engine.kernels.linear_sample import linear_sample
    from engine.kernels.native import native_name
    from engine.kernels.paged_attention import PAGE_SIZE, KVLayout, kv_cache_shapes, paged_attention
    from engine.kernels.rms_norm import rms_norm
    from engine.kernels.rope_kv_write import kv_write, rope_kv_write

    __all__ = [
        "PAGE_SIZE",
        "ConsistencyLoss",
        "ConsistencyLossOutput",
        "Field",
        "JacobiState",
        "KVLayout",
        "LinearWeight",
        "LossStats",
        "NoiseRows",
        "PackedRows",
        "Phase",
        "Rate",
        "consistency_loss",
        "embedding",
        "gated_activation",
        "jacobi_accept",
        "jacobi_pack",
        "kv_cache_shapes",
        "kv_write",
        "linear",
        "linear_argmax",
        "linear_sample",
        "native_name",
        "paged_attention",
        "rms_norm",
        "rope_kv_write",
    ]
