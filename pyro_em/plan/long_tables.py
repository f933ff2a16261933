"""Models whose rows read discrete latents of another plate by an index: when they may be laid out."""

from __future__ import annotations

from pyro_em.graph.structure import SiteInfo, Structure
from pyro_em.plan.task import Task
from pyro_em.tracing.long_format import LongFormat, Read
from pyro_em.tracing.sites import Role


def in_long_format(task: Task, structure: Structure) -> LongFormat | None:
    """A model whose long tables lie under the plates of the latents that they read.

    Args:
        task: The user's model, and what is wanted of it.
        structure: Its skeleton, in which sites read latents from outside their plates.

    Returns:
        The model, to be looked at like any other; None where no site reads so.
    """
    if isinstance(task.model, LongFormat) or structure.random_plates:
        return None
    reads = {}
    for name, info in structure.sites.items():
        outside = [z for z in info.scope if z != name and _is_outside(structure.sites[z], info)]
        if not outside:
            continue
        read = _read(structure, info, outside)
        if read is None:
            return None
        reads[name] = read
    depth = -1 - max(structure.max_plate_nesting, 1)
    return LongFormat(task.model, reads, depth) if reads else None


def _is_outside(latent: SiteInfo, site: SiteInfo) -> bool:
    return latent.support_size is not None and not set(latent.plates) <= set(site.plates)


def _read(structure: Structure, site: SiteInfo, latents: list[str]) -> Read | None:
    """How an observed site of one plate reads latents of another one; None where it is another case."""
    plates = {structure.sites[z].plates for z in latents}
    if site.role is not Role.DATA or len(site.plates) != 1 or len(plates) != 1:
        return None
    (own,), (rows,) = plates, site.plates
    if len(own) != 1 or any(structure.plates[p].dim != -1 for p in (*own, rows)):
        return None
    return Read(tuple(latents), own[0], rows)
