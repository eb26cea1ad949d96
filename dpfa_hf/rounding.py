"""What float64 proves about clipped sums (P18): two bounds in the worst case, and the constants that they rest on.

Bounds of public numbers, for the plan. `per_example.gradients.PerExampleGradients` with `exact_sums` keeps them, and
enforces what they assume. Throughout, g(k) = k u / (1 - k u) with u = 2**-53: a sum of products of which every term
goes through at most k roundings is off by at most g(k) times the sum of the terms' sizes, in whatever order it is taken
(Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1). Assumed are IEEE 754's float64, and BLAS
products of which that holds, as it does of every one that multiplies and adds.

Nothing underflows or overflows: what the engine captures has 32 bits or fewer, or is a sum of such values, and a
coefficient below float32's least normal number counts as 0.
"""

from __future__ import annotations

from dpfa_hf.errors import PrivacyError

# Largest ratio of an example's mass (sum of |left_t| |right_t|) to the norm it is clipped by. Beyond it, rounding
# would show in a visible part of C; such an example is scaled by its mass instead. Ordinary rows stay far below.
MAX_CANCELLATION = 256.0
# With `exact_sums`: the most terms of one coordinate of one example's gradient (its positions, times the uses of a tied
# weight), and the most rows or columns of a layer. A longer example adds zero, a larger layer is refused.
MAX_TERMS = 2**20


def _g(roundings: float) -> float:
    return roundings * 2.0**-53 / (1 - roundings * 2.0**-53)


def contribution_error() -> float:
    """The part of C by which one example's contribution may be longer than C, with `exact_sums`; below 2**-11.9.

    Guarantee:
        |coefficient_i gradient_i| <= C (1 + returned) over the whole trainable vector, with the coefficient as computed
        and gradient_i the exact sum of left_t^T right_t, of looked-up rows and of written-out vectors, over the values
        as captured. The coordinates of `dpfa_hf.statistics` are within the same factor of their planned lengths.

    Proof: let n = MAX_TERMS, g_p the gradient of a parameter p, m_p its mass (the sum of the lengths of its terms) and
    Q_p its computed squared norm.
    (a) |g_p|^2 <= Q_p (1 + g(n^2)) + g(16 n) m_p^2, to first order in what remains. Where a gradient is formed (tiles,
    lookups, examples written out), its coordinates are off by g(2 n) times sizes whose norm is at most m_p, so its
    square by at most g(5 n) m_p^2; squares of at most n^2 coordinates, none negative, are added up. In Gram form a term
    (left_s . left_t) (right_s . right_t) goes through fewer than 8 n roundings (both inner products, and the sums over
    s and over t), and by Cauchy and Schwarz the terms' sizes add up to at most m_p^2. A tied head and its embedding
    give three such sums, |a|^2 + |b|^2 + 2 <a, b>, of which the sizes add up to at most (m_a + m_b)^2 = m_p^2. What
    `layers.py` adds for its worst errors only lengthens, as does raising to 0.
    (b) Masses, their squares and sums over parameters are of terms that are not negative: right to g(n^2), since no sum
    of squares has more terms.
    (c) What clips, N, is at least sqrt(sum Q_p) and sqrt(sum m_p^2) / MAX_CANCELLATION, but for (b). So the gradient's
    squared norm is at most N^2 (1 + g(n^2) + MAX_CANCELLATION^2 g(16 n)), and its norm at most N (1 + half of what is
    returned).
    (d) The other half is 2**-13. It holds what was left out: the square root, the share C / sqrt(groups), the division,
    (b), terms of second order; five roundings in a coordinate of the statistics; and, in the plan, those of the joint
    sensitivity and of the noise's standard deviation. Each is below 2**-20.
    Per-layer clipping gives every group its share of C by the same steps, and the shares' squares add up to C^2.
    """
    return _g(MAX_TERMS**2) + MAX_CANCELLATION**2 * _g(16 * MAX_TERMS)


def summation_error(clipping_norm: float, *, examples: int, terms: int = MAX_TERMS) -> float:
    """The most by which a sum taken with `exact_sums` can be off, in l2 norm over the whole joint vector.

    Args:
        clipping_norm: C.
        examples: the most examples that may have been added up, B, each in a micro-batch of its own or not.
        terms: the most terms of one coordinate of one example: its positions, times the uses of a tied weight.

    Guarantee:
        |computed - exact| <= returned, where exact is the sum of coefficient_i gradient_i (see `contribution_error`) in
        real arithmetic, beside it that of the examples' statistics as they were computed. The worst case, whatever the
        values, the order of the examples, and the order in which BLAS adds. So for two sets of at most B examples the
        sums differ by at most the exact sums' difference plus twice this, provided that what is captured of an example,
        and with it its coefficient, has the same bits in both.

    Proof: uses of one kind are merged, so that a parameter has at most three parts. A part of an example is formed by
    itself, every term multiplied twice and added up in at most `terms` steps, and then added to the sum: a term goes
    through at most k = terms + 3 B + 4 roundings. The terms' sizes, as a matrix, have at most the mass for their norm;
    over the parameters, the root of the squared masses, M_i. A coefficient is at most C / (M_i / MAX_CANCELLATION), in
    each of G groups C / sqrt(G) in place of C, so coefficient_i M_i <= MAX_CANCELLATION C over all groups, but for a
    part below 2**-13; and the norm of a sum over examples is at most the sum of norms: MAX_CANCELLATION C B g(k). The
    statistics go through B + 4 roundings, and their sizes are below 1.2 C B: together with the gradient's, that is
    longer than it alone by a part below 2**-15.
    """
    roundings = terms + 3 * examples + 4
    if terms < 1 or examples < 1 or roundings >= 2**51:
        raise PrivacyError(f"terms={terms} and examples={examples} must be at least 1, and less than 2**49")
    return MAX_CANCELLATION * clipping_norm * examples * _g(roundings) * (1 + 2.0**-12)
