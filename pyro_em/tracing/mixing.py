"""Which operations of a model may mix the elements of a plate: sums, shifts, sorts, products.

An enumerated latent has one element for its whole plate, so that ``z.roll(1, -1)`` moves nothing
and ``z.mean(-1)`` is ``z``. Whether elements of a plate read each other can only be found out with
numbers, by runs of their own. Most models need none: all that they do with a latent acts element by
element, or along dimensions that have not the size of one of its plates. What is not known here is
taken to mix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Element by element, up to broadcasting; or nothing but a dimension of size one, new or dropped.
_ELEMENTWISE = _words("""
    add sub rsub subtract mul multiply div divide true_divide floor_divide remainder fmod pow neg
    negative abs absolute sign sgn exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square reciprocal
    sigmoid logit tanh sin cos tan asin acos atan atan2 arctan2 sinh cosh asinh acosh atanh erf erfc
    erfinv lgamma digamma polygamma mvlgamma relu relu6 softplus elu selu celu gelu silu leaky_relu
    hardtanh logsigmoid softsign clamp clamp_min clamp_max clip floor ceil round trunc fix frac
    maximum minimum fmax fmin eq ne lt le gt ge isclose logical_and logical_or logical_xor
    logical_not bitwise_and bitwise_or bitwise_xor bitwise_not isnan isfinite isinf nan_to_num lerp
    addcmul addcdiv xlogy logaddexp logaddexp2 heaviside hypot to type type_as long int short float
    double half bfloat16 bool byte cpu cuda detach clone contiguous requires_grad_ masked_fill
    one_hot zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones
    new_full new_tensor new_empty expand expand_as broadcast_to broadcast_tensors unsqueeze squeeze
    atleast_1d atleast_2d is_floating_point is_complex dim ndimension size stride numel nelement
    data_ptr element_size is_contiguous get_device storage_offset backward register_hook retain_grad
    diag_embed stack dropout
    __and__ __or__ __xor__ __invert__ __rand__ __ror__ __rxor__ __add__ __radd__ __sub__ __rsub__
    __mul__ __rmul__ __truediv__ __rtruediv__ __floordiv__ __rfloordiv__ __mod__ __rmod__ __pow__
    __rpow__ __neg__ __abs__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __len__ __bool__ __int__
    __float__ __index__ __hash__ __repr__ __format__ item __set__
    """)


# Along the dimensions that are named, or along all of them.
_ALONG = _words("""
    sum mean nansum nanmean prod std var std_mean var_mean median nanmedian mode quantile logsumexp
    norm any all max min amax amin aminmax argmax argmin count_nonzero softmax log_softmax softmin
    cumsum cumprod cummax cummin logcumsumexp sort argsort msort topk kthvalue flip roll fliplr
    flipud diff select narrow unbind chunk split tensor_split index_select gather take_along_dim
    cat concat concatenate normalize unfold index_add index_fill index_copy glu cosine_similarity
    repeat_interleave __iter__
    """)


_LAST = _words("sort argsort topk kthvalue median mode diff")

_FIRST = _words("unbind chunk split tensor_split cat concat concatenate msort __iter__")

_SECOND = _words("normalize cosine_similarity")

_DIM_AT: Mapping[str, int] = {"roll": 2, "quantile": 2, "norm": 2, "topk": 2, "kthvalue": 2} | {
    "split": 2,
    "chunk": 2,
    "tensor_split": 2,
    "diff": 2,
    "normalize": 2,
    "cosine_similarity": 2,
    "repeat_interleave": 2,
    "take_along_dim": 2,
}


_PERMUTE = _words("permute transpose t swapaxes swapdims movedim moveaxis adjoint mT T __get__")

_RESHAPE = _words("view reshape flatten unflatten view_as reshape_as ravel")

_MATRIX = _words("""
    cholesky linalg_cholesky cholesky_ex linalg_cholesky_ex inverse linalg_inv linalg_det det logdet
    slogdet linalg_slogdet solve_triangular linalg_solve_triangular triangular_solve cholesky_solve
    cholesky_inverse linalg_solve tril triu matrix_exp diagonal trace linalg_eigh linalg_eigvalsh
    """)


_WHOLE = (None, None, None)

# With a latent as an index, or as one of the batch dimensions that broadcast.
_FROM_THE_RIGHT = _words("__getitem__ embedding linear gather")

_PRODUCT = _words("matmul mm bmm mv dot inner __matmul__ __rmatmul__")


# What leaves torch carries no tag.
_NUMBERS = _words("""
    item tolist numpy __array__ __int__ __float__ __bool__ __index__ __complex__ __format__ equal
    allclose is_nonzero
    """)


# What writes into its first argument: a plain tensor that is written into carries no tag.
_WRITES = _words("__setitem__ __set__")


class Mixing:
    """Watches operations on tagged tensors, and notes the latents whose elements they may mix.

    Args:
        plates: Per latent the sizes of its plates that have several elements.

    Attributes:
        suspects: Latents whose plates' elements may have been mixed.
        read: Latents that were turned into numbers or arrays of Python, or written into tensors.
        joined: Latents outside plates of which whole tensors may have been summed, sorted, compared or
            laid out anew: once they are enumerated these hold all of their values.
    """

    def __init__(self, plates: Mapping[str, frozenset[int]]) -> None:
        self.plates = {name: sizes for name, sizes in plates.items() if sizes}
        self.suspects: set[str] = set()
        self.read: set[str] = set()
        self.joined: set[str] = set()
        self._known: dict[frozenset[str], tuple[frozenset[str], frozenset[int]]] = {}

    def see(
        self,
        func: Callable[..., Any],
        args: tuple,
        kwargs: Mapping[str, Any],
        tags: frozenset[str],
        is_tagged: Callable[[Any], bool],
        out: Any,
    ) -> None:
        """Look at one operation.

        Args:
            func: What was called.
            args: Its positional arguments, tagged tensors as they are.
            kwargs: Its keyword arguments.
            tags: The tags of all of them.
            is_tagged: Whether an argument is a tagged tensor.
            out: What it returned, without tags.
        """
        name = getattr(func, "__name__", "")
        if name in _NUMBERS or (_is_written(name, kwargs) and not is_tagged(args[0])):
            self.read |= tags
        if name in _ELEMENTWISE or (name[-1:] == "_" and name[:-1] in _ELEMENTWISE):
            return
        own, sizes = self._of(tags)
        if len(own) < len(tags) and not _is_from_the_right(name, args, kwargs):
            self.joined |= tags - own
        if name == "__getitem__" and own and not _is_laid_anew(args[1]):
            # An index is read element by element: what may be mixed is what it chooses from.
            own, sizes = self._of(getattr(args[0], "_provenance", frozenset()))
        if own and not own <= self.suspects and _may_mix(name, args, kwargs, sizes, is_tagged, out):
            self.suspects |= own

    def _of(self, tags: frozenset[str]) -> tuple[frozenset[str], frozenset[int]]:
        """Those of some latents that are in plates, and the sizes of these."""
        if tags not in self._known:
            own = tags & self.plates.keys()
            self._known[tags] = own, frozenset(n for z in own for n in self.plates[z])
        return self._known[tags]


def _is_from_the_right(name: str, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation counts its dimensions from the right, where no value of a latent lies."""
    if name in _FROM_THE_RIGHT or name in _PRODUCT or name in _MATRIX or name in _PERMUTE:
        return True
    if name == "where":
        return len(args) + len(kwargs) > 1
    if name not in _ALONG or not args:
        return False
    if name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
        return True
    if isinstance(args[0], Tensor) and not _shape(args[0]):
        return False
    dims = _dims_given(name, args, kwargs)
    chosen = (dims,) if isinstance(dims, int) else dims
    return _are_ints(chosen) and all(d < 0 for d in chosen)


def _dims_given(name: str, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The dimensions along which an operation acts, where they are named."""
    dims = kwargs.get("dim", kwargs.get("dims", kwargs.get("axis")))
    place = _DIM_AT.get(name, 1)
    if dims is None and len(args) > place:
        dims = args[place]
        if isinstance(dims, int) and name in ("flip", "permute") and len(args) > place + 1:
            dims = args[place:]
    if dims is None and name in _LAST:
        dims = -1
    return dims


def _is_written(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation writes into a tensor that was there before."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITES or kwargs.get("out") is not None


def _may_mix(
    name: str,
    args: tuple,
    kwargs: Mapping[str, Any],
    sizes: frozenset[int],
    is_tagged: Callable[[Any], bool],
    out: Any,
) -> bool:
    operand = args[0] if args else None
    shape = _shape(operand)
    if name in _PERMUTE:
        return isinstance(out, Tensor) and sum(n in sizes for n in shape) > 1
    if name in _RESHAPE:
        return _without_ones(shape) != _without_ones(tuple(out.shape))
    if name == "__getitem__":
        return is_tagged(operand) and _cuts(shape, args[1], sizes)
    if name in _PRODUCT:
        a, b = (args[1], args[0]) if name == "__rmatmul__" else (args[0], args[1])
        left, right = _shape(a), _shape(b)
        return (is_tagged(a) and left[-1:][0] in sizes) or (is_tagged(b) and right[-2:][0] in sizes)
    if name == "linear":
        return any(is_tagged(a) for a in args[1:]) or shape[-1] in sizes
    if name == "embedding":
        return any(is_tagged(a) for a in args[1:])
    if name in _MATRIX:
        return any(n in sizes for a in args if isinstance(a, Tensor) for n in _shape(a)[-2:])
    if name == "gather" and not is_tagged(operand):
        return False
    if name == "where":
        return len(args) + len(kwargs) < 2
    if name == "pad":
        padded = args[1] if len(args) > 1 else kwargs.get("pad", ())
        return any(n in sizes for n in shape[-(len(padded) + 1) // 2 :])
    if name == "einsum":
        return _sums_over(args, sizes, is_tagged)
    if name in _ALONG:
        return _along(name, args, kwargs, sizes, shape)
    return True


def _along(
    name: str, args: tuple, kwargs: Mapping[str, Any], sizes: frozenset[int], shape: tuple[int, ...]
) -> bool:
    if name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
        return False
    if name in ("cat", "concat", "concatenate"):
        shapes = [_shape(a) for a in args[0]]
        shape = tuple(max(ns) for ns in zip(*shapes, strict=False))
    dims = _dims_given(name, args, kwargs)
    if dims is None:
        if name in _FIRST:
            dims = 0
        elif name in _SECOND:
            dims = 1
        else:
            return any(n in sizes for n in shape)
    if not isinstance(dims, int) and not _are_ints(dims):
        return True
    chosen: Iterable[int] = (dims,) if isinstance(dims, int) else dims
    return any(-len(shape) <= d < len(shape) and shape[d] in sizes for d in chosen)


def _cuts(shape: tuple[int, ...], index: Any, sizes: frozenset[int]) -> bool:
    """Whether an index takes part of a dimension that may be a plate, or lays it out anew."""
    if _is_laid_anew(index):
        return True
    parts = index if isinstance(index, tuple) else (index,)
    taken = [p for p in parts if p is not None and p is not Ellipsis]
    before = parts
    for i, p in enumerate(parts):
        if p is Ellipsis:
            before = parts[:i]
            break
    n_before = sum(p is not None for p in before)
    n_after = len(taken) - n_before
    dims = [*range(n_before), *range(len(shape) - n_after, len(shape))]
    return any(
        shape[d] in sizes and not (isinstance(p, slice) and (p.start, p.stop, p.step) == _WHOLE)
        for d, p in zip(dims, taken, strict=True)
    )


def _is_laid_anew(index: Any) -> bool:
    """Whether an index is a list or says yes or no, so that what it takes has places of its own."""
    return any(
        isinstance(p, (list, bool))
        or (isinstance(p, Tensor) and _dtype(p) in (torch.bool, torch.uint8))
        for p in (index if isinstance(index, tuple) else (index,))
    )


def _sums_over(args: tuple, sizes: frozenset[int], is_tagged: Callable[[Any], bool]) -> bool:
    """Whether an einsum sums over a dimension of a tagged operand that may be a plate."""
    equation, operands = args[0], args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "..." in equation or "->" not in equation:
        return True
    inputs, kept = equation.replace(" ", "").split("->")
    return any(
        size in sizes and letter not in kept
        for letters, operand in zip(inputs.split(","), operands, strict=False)
        if is_tagged(operand)
        for letter, size in zip(letters, _shape(operand), strict=False)
    )


def _are_ints(dims: Any) -> bool:
    return isinstance(dims, (tuple, list)) and all(isinstance(d, int) for d in dims)


def _dtype(tensor: Tensor) -> torch.dtype:
    plain: Tensor = getattr(tensor, "_t", tensor)
    return plain.dtype


def _shape(value: Any) -> tuple[int, ...]:
    plain = getattr(value, "_t", value) if isinstance(value, Tensor) else None
    return () if plain is None else tuple(plain.shape)


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [n for n in shape if n != 1]
