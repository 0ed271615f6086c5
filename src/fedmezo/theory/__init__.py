"""The convergence theory of FedMeZO as numbers: printed bounds, what is wrong with them, and bounds that hold.

    constants.py    what is assumed (L, r, d, c_g, ...), the setting (N, H, T, eta, mu), gamma, zeta and their kin
    caps.py         how large a rate each theorem allows, and which condition binds
    chain.py        the steps of the proof, as printed and corrected, one function each
    bound.py        a bound: named terms, their total, and why it says nothing when it says nothing
    printed.py      Theorems 3.1 and 3.4, Corollaries 3.2 and 3.5, in both of the paper's versions
    corrected.py    bounds B1 and B2, which hold
    recommend.py    rates, mu and rounds: the paper's, and those that the corrected bounds ask for
    beside.py       all bounds of one setting beside each other
    errata.py       what is wrong in print, one line each

Functions are pure and take plain numbers. Symbols, equation numbers and errata (E1 to E20) are those of
arXiv:2402.05926v1 and docs/theory.md.
"""
