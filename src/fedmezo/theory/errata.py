"""What is wrong in print, one line each, for tables and reports."""

from dataclasses import dataclass

__all__ = ["ERRATA", "Erratum"]


@dataclass(frozen=True)
class Erratum:
    """One mistake of arXiv:2402.05926v1.

    Attributes:
      key: E1 to E20, as in docs/theory.md.
      where: the equation or section.
      printed: what is wrong there.
      here: what is used instead.
    """

    key: str
    where: str
    printed: str
    here: str


_ROWS = (
    (
        "Eqs. 16, 34, 50",
        "T1 enters with a minus sign and is replaced by an upper bound, so that heterogeneity seems to help",
        "T1 = |grad f|^2; in B1 and B2 heterogeneity has a plus",
    ),
    (
        "Lemma 2.2",
        "the estimate is called unbiased; its mean is grad F_mu, the gradient of the smoothed loss",
        "the bias is at most mu L sqrt(d), and 0 on quadratics",
    ),
    ("Lemma C.1", "gamma lacks its 1", "1 + (r + 1) / n (Gaussian), 1 + (d r + d - 2) / (n (d + 2)) (sphere)"),
    ("Lemma C.2", "the norm ratio (d + n - 1) / n is the sphere's", "(d + n + 1) / n for Gaussian directions"),
    ("Lemma 2.3", "eta is read as the step taken, proved for eta / gamma", "the rate is the step taken unless said"),
    ("Eq. 16", "the first-order term counts one step, the second-order term H", "B1 counts H in both"),
    ("Eqs. 17, 35", "Jensen's inequality lacks a factor H, or N H", "the factor is H / N"),
    (
        "Eqs. 18, 37",
        "a sphere's lemma is used on Gaussian directions and divided by d^2",
        "E|e|^2 <= 2 (d + 2) E|grad F|^2 + mu^2 L^2 d (d + 2) (d + 4) / 2",
    ),
    (
        "Corollaries 3.3, 3.6",
        "the second O() does not follow from the recommended mu",
        "terms come from Eqs. 9 and 13, never from the O()",
    ),
    (
        "Corollaries 3.3, 3.6",
        "the recommended rate breaks the rate condition for any ordinary T",
        "`paper_choice` tells the rounds from which on it does not",
    ),
    (
        "Theorem 3.4",
        "c-tilde_h is c_h + N in one place, c_h + 1 in another, and 1 / N comes and goes",
        "two versions, each consistent in itself",
    ),
    ("Corollary 3.5", "Gamma-tilde is called of order 1 / r; it is 1 / (r N)", "computed, never estimated"),
    ("Eq. 43", "the sum of tau^2 from 2 to H is not below H^3 / 3", "the sum of (tau - 1)^2 is"),
    (
        "Sections 3.1, 3.2",
        "slips: zeta gamma is 1 / d whatever r is; the terms of Eq. 13 are divided by c-tilde_h, not c_g",
        "as the formulas have it",
    ),
    ("Table 1", "memory is said to be one third; the ratios are 0.38, 0.55 and 0.63", "claim: near inference level"),
    ("Section 5.4", "alpha = 5e-6 does nothing in Eq. 15; the code adds it to the rate", "alpha = 0.5 in Eq. 15"),
    ("Section 5.1", "the baseline's local epoch is 30 batches in the released configurations", "steps are explicit"),
    ("Appendix E.2", "the patience of 30 epochs is off in the released configurations", "units are explicit"),
    ("Section 5.4", "personalised rates were run on i.i.d. clients, though Assumption 6 motivates them", "any split"),
    (
        "Section 5.2",
        "faster than SGD at equal rates, where the zeroth-order step is sqrt(d + 2) times longer",
        "compare at equal and at tuned rates",
    ),
)

ERRATA = tuple(Erratum(f"E{number}", *row) for number, row in enumerate(_ROWS, start=1))
