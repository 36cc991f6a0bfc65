"""The solvers of LearnLoss's quadratic program, and which comes when."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from lossmeta.tuneloss import _clarabel, _cvxpy, _daqp, _osqp
from lossmeta.tuneloss._margin import margin
from lossmeta.tuneloss._program import VIOLATION, Answer, Program, Proposal, certified
from lossmeta.tuneloss._refinement import Stopped, refined

Solve = Callable[[Program], Answer]

SOLVERS: dict[str, Solve] = {
    "daqp": partial(refined, nearest_point=_daqp.nearest_point),
    "clarabel": partial(refined, nearest_point=_clarabel.nearest_point),
    "osqp": partial(refined, nearest_point=_osqp.nearest_point),
    "cvxpy": _cvxpy.solve,
}

# By how much constraints give way where only that lets any point satisfy them.
SLACK = VIOLATION / 2


class NotCertified(RuntimeError):
    """No solver gave an answer that could be verified; the message says what each did."""


def order(name: str, solver: str) -> list[str]:
    """The solvers to try, one after the other.

    Raises:
        ValueError: for a name that is none.
        ImportError: for a solver that is not installed.
    """
    if solver == "auto":
        # DAQP was quickest at all sizes that were measured: 5 to 501 features, 10 to 20,000 models, gradients or none.
        return ["daqp", "clarabel", "osqp"]
    if solver not in SOLVERS:
        names = ", ".join(map(repr, ["auto", *SOLVERS]))
        raise ValueError(f"{name}: solver must be one of {names}, got {solver!r}")
    try:
        importlib.import_module(solver)
    except ImportError as error:
        raise ImportError(
            f"{name}: solver must be installed, got {solver!r} and {error}; install it, or let solver='auto' choose"
        ) from error
    return [solver]


def solve(name: str, program: Program, solvers: list[str]) -> tuple[str, Answer] | None:
    """The solver that answered, and its answer; ``None`` where no point satisfies the constraints, which is proven.

    Raises:
        NotCertified: where neither can be verified.
    """
    if not len(program.lower):
        return "none", certified(program, Proposal(program.lower, np.zeros(0)))
    said: list[str] = []
    slack: float | None = None
    for solver in solvers:
        answer = _attempt(solver, program, slack or 0.0, said)
        if answer is None and slack is None:
            found = margin(program.rows, program.right, program.lower, program.upper)
            if found is not None and found.bound < -SLACK:
                return None
            slack = 0.0
            if found is not None and found.reached < SLACK:  # there are points, but hardly more than one
                slack = SLACK
                answer = _attempt(solver, program, slack, said)
        if answer is not None:
            return solver, answer
    raise NotCertified(
        f"{name}: no solver gave an answer that could be verified: {'; '.join(said)}; scale the features, leave out "
        "models that are all but equal, or fix more components"
    )


def _attempt(solver: str, program: Program, slack: float, said: list[str]) -> Answer | None:
    """A certified answer, or why there is none."""
    try:
        answer = SOLVERS[solver](program.relaxed(slack) if slack else program)
    except ImportError:
        said.append(f"{solver} is not installed")
        return None
    except Stopped as stopped:
        said.append(f"{solver} says {stopped}")
        return None
    except Exception as error:  # whatever a solver raises, there is another; an interruption is no Exception
        said.append(f"{solver} raised {type(error).__name__}: {error}")
        return None
    certificate = replace(answer.certificate, violation=answer.certificate.violation + slack)
    if certificate.holds:
        return replace(answer, certificate=certificate)
    said.append(f"{solver} left violation {certificate.violation:.1e} and gap {certificate.gap:.1e}")
    return None
