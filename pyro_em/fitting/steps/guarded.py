"""EM steps, quick where they can be and sound where they must be: the one place of handing over.

A quick step that is out of the ordinary (a component near a collapse, impossible data, a fall of the
objective) is not judged by itself: the step through tables is taken instead, which names what is
wrong or goes on. After the first step a fresh trace of the model confirms what the step computed with.

What is known of the model may change on the way: somebody writes data between two steps, a trace does
not confirm the bindings, a later trace takes the place of an earlier one. The program of a fit is
replaced here and nowhere else; ``sound`` holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pyro_em.errors import Handover, TooFar, message, warn
from pyro_em.fitting.steps.by_parts import ByParts
from pyro_em.fitting.steps.em_map import ByTracing, after_m_step
from pyro_em.fitting.steps.em_on_sums import OnSums, SumsPoint, on_sums
from pyro_em.fitting.steps.parted import Parted
from pyro_em.fitting.steps.point import Point
from pyro_em.fitting.steps.run import Held
from pyro_em.plan.agreement import disagreements_of
from pyro_em.plan.eligibility import Kernel
from pyro_em.plan.evaluation import Disagreement
from pyro_em.plan.program import Program
from pyro_em.plan.verification import distrusted
from pyro_em.tracing.parameters import restore, snapshot, write
from pyro_em.updates.m_step import MStepState

_MANY_HANDOVERS = 3

_FAR = 1e-2  # of a handover: a step that only went too far is no reason to doubt those after it


class Fell(Exception):
    """The objective fell; it has been reported, and the parameters are those before the step."""


class Unconfirmed(Exception):
    """A fresh trace does not agree with what steps compute from the parameters; holds where not."""

    def __init__(self, off: Disagreement) -> None:
        super().__init__(*off.places)
        self.off = off


@dataclass(frozen=True, eq=False)
class Step:
    """A complete step.

    Attributes:
        before: Where it began.
        bound: ELBO(q, θ_new) after its M-step, in nats.
        after: Where it led.
        is_public: Whether the param store holds the parameters there.
    """

    before: Point
    bound: float
    after: Point
    is_public: bool = False


class Guarded:
    """The EM map of a fit: on sums where its program has them, through tables otherwise.

    Args:
        program: The model with its data, as a reading found them.
        state: What lasts from one M-step to the next.
        data: The parts of the data; None where the program has all.
        remembers: Whether points through tables say what they were made from.

    Attributes:
        sound: The map through tables, which holds the program as it is known now.
        quick: The map on sums, where it may be used.
        handovers: How many quick steps were left to ``sound``; of one too far a hundredth.
        far: Whether the last quick step went further than its sums tell.
        doubts: What has shown that the program's bindings are not what the model does.
    """

    def __init__(
        self,
        program: Program,
        state: MStepState | None = None,
        data: Parted | None = None,
        *,
        remembers: bool = False,
    ) -> None:
        self.state, self.data = MStepState() if state is None else state, data
        self.remembers = remembers
        self._begin(program)
        self.doubts: list[Disagreement] = []
        self.quick: OnSums | None = None
        self.start_over()

    def _begin(self, program: Program) -> None:
        self.sound: ByTracing | ByParts = (
            ByTracing(program, self.state, self.remembers)
            if self.data is None
            else ByParts(self.data, self.state)
        )
        self._rounding = _rounding(program.graph.eps)

    @property
    def program(self) -> Program:
        """The model with its data, as it is known now."""
        return self.sound.program

    def start_over(self) -> None:
        """Take quick steps, whatever happened to earlier ones."""
        known = self.quick
        if known is None or (known.program, known.data) != (self.program, self.data):
            self.quick = on_sums(self.program, self.data)
        self.handovers = 0.0
        self.far: TooFar | None = None

    def reread(self) -> None:
        """Read the model on the data as they are now."""
        if self.data is not None:
            self.data.refuse_changes()
        self._begin(self.program.reread())
        self.doubts = []
        self.start_over()

    def distrust(self, off: Disagreement) -> None:
        """Run the model at each step from now on: its bindings are not what it does."""
        if self.data is not None:
            self.data = self.data.distrusted(off)
        self._begin(distrusted(self.program, off))
        self.doubts.append(off)

    def stay_sound(self) -> None:
        """Take no quick steps any more: somebody writes parameters between steps."""
        self.quick = None

    def e_step(self, index: int = 0) -> Point:
        """The E-step at the parameters in the param store."""
        return self._quick_e_step() or self.sound.e_step(index=index)

    def _quick_e_step(self) -> SumsPoint | None:
        if self.quick is None:
            return None
        try:
            return self.quick.e_step()
        except Handover:
            return None

    def step(
        self,
        at: Point,
        index: int,
        *,
        verify: bool = False,
        touched: bool = False,
        last: bool = False,
        held: Held | None = None,
    ) -> Step:
        """One step.

        Args:
            at: Where EM stands.
            index: The number of the step.
            verify: Whether a fresh trace has to confirm what the step computed with.
            touched: Whether somebody has written parameters since, so that a fall is no wonder.
            last: Whether no other follows: its E-step is made at what the param store holds.
            held: What the store holds before the last step, where that is known.

        Raises:
            Fell: If the objective fell.
            DegenerateError: If an update is degenerate; it has been rolled back.
        """
        if self.quick is not None and self.program.compiled and self.handovers < _MANY_HANDOVERS:
            at = self._again(at)
            found = self._last_quick_step(at, held) if last else self._quick_step(at, verify)
            if found is not None:
                return found
            self.handovers += 1.0 if self.far is None else _FAR
        return self._sound_step(at, index, verify, touched)

    def _again(self, at: Point) -> Point:
        """A point on sums, after a step through tables has been taken."""
        if isinstance(at, SumsPoint):
            return at
        again = self._quick_e_step()
        if again is None:
            return at
        again.massless = at.massless
        return again

    def _quick_step(self, at: Point, verify: bool) -> Step | None:
        """A step on sums; None where one through tables is due, and then nothing was changed."""
        if self.quick is None or not isinstance(at, SumsPoint):
            return None
        self.far = None
        try:
            after, bound = self.quick.step(at)
        except Handover as handover:
            self.far = handover if isinstance(handover, TooFar) else None
            return None
        if self._has_fallen(at, after):
            return None
        if verify and not self._is_confirmed_at(after.values):
            return None
        return Step(at, bound, after, is_public=verify)

    def _last_quick_step(self, at: Point, held: Held | None) -> Step | None:
        """As `_quick_step`, with the parameters in the param store, where a transform may round."""
        if self.quick is None or not isinstance(at, SumsPoint):
            return None
        self.far = None
        origin = snapshot(self.program.graph.parameters) if held is None else held.unconstrained
        try:
            values, bound = self.quick.m_step(at)
            write(self.program.graph.parameters, values, None if held is None else held.values)
            after = self.quick.e_step()
        except Handover as handover:
            self.far = handover if isinstance(handover, TooFar) else None
            restore(self.program.graph.parameters, origin)
            return None
        if self._has_fallen(at, after):
            restore(self.program.graph.parameters, origin)
            return None
        return Step(at, bound, after, is_public=True)

    def _has_fallen(self, at: Point, after: Point) -> bool:
        return after.objective < at.objective - self._allowed_fall(at)

    def _allowed_fall(self, at: Point) -> float:
        """By how much rounding may lower the objective, in nats."""
        return self._rounding * max(1.0, abs(at.objective))

    def _sound_step(self, at: Point, index: int, verify: bool, touched: bool) -> Step:
        program = self.program
        if isinstance(at, SumsPoint):
            at = self.sound.judged(at if touched else self.published(at))
        origin = snapshot(program.graph.parameters)
        try:
            confirm = self._confirm if verify and program.compiled else None
            after, bound = self.sound.step(at, index, confirm)
        except Unconfirmed as error:  # the parameters are as before the step
            self.distrust(error.off)
            after, bound = self.sound.step(self.sound.e_step(index=index), index)
            if self.data is None:
                bound = after_m_step(at, after.evaluation.tables)
        allowed = self._allowed_fall(at)
        if not touched and self.sound.has_fallen(at, after, allowed):
            restore(self.program.graph.parameters, origin)
            raise Fell
        return Step(at, bound, after)

    def published(self, at: Point) -> SumsPoint:
        """A point on sums with its parameters in the param store, where a transform may round."""
        assert isinstance(at, SumsPoint)
        write(self.program.graph.parameters, at.values)
        again = self._quick_e_step()
        if again is None:
            return at
        again.massless = at.massless
        return again

    def publish(self, step: Step, was_public: bool) -> None:
        """Put the parameters after a step into the param store.

        Args:
            step: The step, which has not put them there itself.
            was_public: Whether the store holds those before it, so that only what moved is written.
        """
        if isinstance(step.after, SumsPoint):
            before = (
                step.before.values if was_public and isinstance(step.before, SumsPoint) else None
            )
            write(self.program.graph.parameters, step.after.values, before)

    def _is_confirmed_at(self, values: Mapping[str, Tensor]) -> bool:
        """Write values and hold a fresh trace against them.

        If it differs, the parameters are as before, and the contraction takes over, which runs the
        model at each step.
        """
        origin = snapshot(self.program.graph.parameters)
        try:
            write(self.program.graph.parameters, values)
            self._confirm()
            return True
        except Unconfirmed as error:
            restore(self.program.graph.parameters, origin)
            self.distrust(error.off)
            return False
        except BaseException:
            restore(self.program.graph.parameters, origin)
            raise

    def disagreements(self, current: Mapping[str, Tensor] | None = None) -> Disagreement:
        """Where a fresh trace differs from what the bindings predict.

        Args:
            current: The parameters in the param store, where they are known.
        """
        if self.data is not None:
            return self.data.disagreements()
        return disagreements_of(self.program, current=current)

    def _confirm(self) -> None:
        """Hold a fresh trace against what steps compute from the parameters.

        Raises:
            Unconfirmed: If it differs; it has been said.
        """
        off = self.disagreements()
        if off:
            warn_disagreement(self.program.kernel, off, "it is not")
            raise Unconfirmed(off)


def warn_disagreement(kernel: Kernel, off: Disagreement, when: str) -> None:
    """Say that what stepped and the model disagree, and that the contraction takes over.

    Args:
        kernel: What stepped.
        off: Where they disagree.
        when: The beginning of the sentence.
    """
    site, argument = off.places[0]
    warn(
        message(
            f"site '{site}', argument '{argument}'",
            f"{when} what the {kernel.stepped()} computed from the parameters. The contraction takes "
            "over from the last verified parameters, and runs the model at each step.",
            "the model changes in a way that its autograd graph does not show",
            ["avoid detach, .item() and branches on parameters in the model"],
        ),
    )


def _rounding(eps: float) -> float:
    """By how much of an objective rounding may lower it; of one below a nat, in nats."""
    return 1e-9 if eps < 1e-12 else 1e-5
