"""Under which headings of NIST SP 800-226, the GDPR and the CCPA the evidence may be relevant, and where it ends.

No score and no verdict (P26): no law names an epsilon, and whether a duty is met is for people to judge who know the
purpose, the people and the risk. The headings are named as their sources name them; what is said under them is ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dpfa_hf.errors import PrivacyError

FRAMEWORKS = {
    "nist": "NIST SP 800-226, Guidelines for Evaluating Differential Privacy Guarantees (March 2025)",
    "gdpr": "Regulation (EU) 2016/679, the GDPR",
    "ccpa": "California Consumer Privacy Act as amended by the CPRA (California Civil Code)",
}
NO_VERDICT = (
    "This is evidence that may be relevant under these headings. It is no score, no verdict and no legal advice: no "
    "law names an ε, and none of the headings is met or missed by what stands here."
)


@dataclass(frozen=True)
class Heading:
    """One heading: what this bundle can contribute under it, and what it cannot."""

    id: str
    framework: str
    name: str
    contributes: str
    cannot: str


HEADINGS = (
    # The blocks of the differential privacy pyramid, figure 1, from its top (section 2) to its base (section 4).
    Heading(
        "nist-parameters",
        "nist",
        "Privacy parameters (section 2)",
        "ε and δ of the run, and those of all recorded runs on the data set; the whole privacy curve, so that other "
        "pairs (ε, δ) can be read off; how they were computed, and with which library.",
        "What ε would be acceptable. Releases of the same data that are not in the ledger.",
    ),
    Heading(
        "nist-unit",
        "nist",
        "Unit of privacy (section 2)",
        "What one unit is, how it was built, which data sets count as neighbours, and what is taken as public.",
        "Whether one person's data are in one unit only: that is the operator's word.",
    ),
    Heading(
        "nist-algorithms",
        "nist",
        "Algorithms and correctness (section 3)",
        "The mechanism with all its numbers, what was enforced while it ran and what was tested before it, the result "
        "of an audit where there is one, and the fingerprint of the code.",
        "A proof that the code is right. An audit can find errors; it cannot show that there are none.",
    ),
    Heading(
        "nist-utility",
        "nist",
        "Utility (section 3)",
        "How noise depends on the batch at the same ε, from public numbers.",
        "How good the model is: nothing here was measured on data.",
    ),
    Heading(
        "nist-bias",
        "nist",
        "Bias (section 3)",
        "Nothing but the clipping norm and the noise, which weigh more on whatever is rare in the data.",
        "Whether the model serves small groups worse. It was not measured.",
    ),
    Heading(
        "nist-access",
        "nist",
        "Access control (section 4)",
        "Ledger entries by number and hash, by which a record that was edited or put back can be noticed.",
        "Who could read the raw data, the noise keys or unreleased files, and who may write to the ledger.",
    ),
    Heading(
        "nist-trust",
        "nist",
        "Trust models (section 4)",
        "That the model is the central one: whoever ran the training saw the raw data.",
        "Whether those people and machines deserved that trust.",
    ),
    Heading(
        "nist-side-channels",
        "nist",
        "Side channels (section 4)",
        "How floating-point arithmetic is treated, what is withheld from logs, and which channels were not assessed.",
        "Time and memory as somebody beside the machine sees them.",
    ),
    Heading(
        "nist-collection",
        "nist",
        "Data collection exposure (section 4)",
        "How many units were read. Nothing else.",
        "Whether the data had to be collected, and what becomes of them after training.",
    ),
    Heading(
        "gdpr-5-1-c",
        "gdpr",
        "Article 5(1)(c), data minimisation",
        "A bound on what the released weights give away about one unit.",
        "Whether the data that training read were limited to what the purpose needs.",
    ),
    Heading(
        "gdpr-5-1-f",
        "gdpr",
        "Article 5(1)(f), integrity and confidentiality",
        "Measures against disclosure through the model: mechanism, parameters, and what was enforced.",
        "Storage, transport and access control of the raw data.",
    ),
    Heading(
        "gdpr-5-2",
        "gdpr",
        "Article 5(2), accountability",
        "A record that others can check: plan and hash, ledger entries, the audit, and a signature where there is one.",
        "That processing was lawful, fair and for a specified purpose.",
    ),
    Heading(
        "gdpr-17",
        "gdpr",
        "Article 17, right to erasure",
        "That the influence of one unit on the weights was bounded before training.",
        "Nothing is erased from the weights, and whether a bound can stand in for that is not said here.",
    ),
    Heading(
        "gdpr-25",
        "gdpr",
        "Article 25, data protection by design and by default",
        "Technical measures fixed before the first step, and defaults that withhold what noise does not cover.",
        "Whether they are appropriate to the state of the art, the cost, the purpose and the risk.",
    ),
    Heading(
        "gdpr-32",
        "gdpr",
        "Article 32, security of processing",
        "Where noise keys come from, what was tested, what was not assessed, and a signature over the model's files.",
        "The security of machines, accounts and networks, and how incidents are handled.",
    ),
    Heading(
        "gdpr-35",
        "gdpr",
        "Article 35, data protection impact assessment",
        "Facts that a description of the processing and of the measures against its risks may cite (35(7)(a) and (d)).",
        "Necessity and proportionality, the risks to people, and their views (35(7)(b) and (c), 35(9)).",
    ),
    Heading(
        "gdpr-recital-26",
        "gdpr",
        "Recital 26, anonymous information",
        "A bound on how well anybody, whatever else they know, can tell from the weights about one unit.",
        "That the model is anonymous: that is judged case by case (see EDPB Opinion 28/2024), and by other means too.",
    ),
    Heading(
        "ccpa-100-c",
        "ccpa",
        "Section 1798.100(c), necessary and proportionate use",
        "A bound on what the released weights give away about one unit.",
        "Whether collecting, using, keeping and sharing the data were necessary and proportionate to the purpose.",
    ),
    Heading(
        "ccpa-100-e",
        "ccpa",
        "Section 1798.100(e), reasonable security",
        "Technical measures against disclosure through the model, and what was enforced or tested of them.",
        "Security procedures and practices around the raw data.",
    ),
    Heading(
        "ccpa-105",
        "ccpa",
        "Section 1798.105, right to delete",
        "That the influence of one unit on the weights was bounded before training.",
        "Nothing is deleted from the weights.",
    ),
    Heading(
        "ccpa-140-m",
        "ccpa",
        "Section 1798.140(m), deidentified information",
        "A measure against inferring information about one consumer from the weights, with its strength.",
        "Whether the weights are deidentified, and the public commitment and the contracts of (m)(2) and (m)(3).",
    ),
)

_MECHANISM = ("nist-algorithms", "gdpr-5-1-f", "gdpr-25", "ccpa-100-e")
_TOTAL = ("nist-parameters", "gdpr-5-2", "gdpr-recital-26", "ccpa-140-m")
_PERSON = ("nist-unit", "gdpr-recital-26", "ccpa-140-m")
_KEEPING = ("nist-access", "nist-trust", "gdpr-5-1-f", "gdpr-32", "ccpa-100-e")
_SIDE = ("nist-side-channels", "gdpr-32", "ccpa-100-e")
# By what an assumption of `dpfa_hf.report` says; the first one that fits.
_RULES = (
    (r"^Noise keys|^Nobody breaks ChaCha20", ("nist-algorithms", "gdpr-32", "ccpa-100-e")),
    (r"^Training stops at the last planned step", ("nist-parameters", "gdpr-5-2", "gdpr-25")),
    (r"^Each unit is sampled|^Every unit's whole gradient|^Noise of the planned size|^Dropout's masks", _MECHANISM),
    (r"^The loss of one unit|^Per-unit gradients|^All processes have the same rows", _MECHANISM),
    (r"^A person's data|^Each row is that of the user|^One row of the data set|^A user is whole", _PERSON),
    (r"^Nothing was computed from private rows", ("nist-algorithms", "gdpr-25", "gdpr-35")),
    (r"^The base model was not trained|^All runs on the same people's data", _TOTAL),
    (r"^The evaluation data|^Evaluation (on|results)", _TOTAL),
    (r"^The ledger was not edited", ("nist-access", "gdpr-5-2", "gdpr-32", "ccpa-100-e")),
    (r"^The machine kept the raw data", _KEEPING),
    (r"^Training loss, gradient norms|^Private figures in the logs", ("nist-side-channels", "gdpr-25", "gdpr-5-1-f")),
    (r"[Rr]ound(s|ing|ed) |^Epsilon is for real|^A row, computed alone|^Arithmetic is IEEE|^PyTorch's float64", _SIDE),
    (r"^Nobody learns from how long|^No row ends the run", _SIDE),
    (r"^An empirical audit|dpfa audit", ("nist-algorithms", "gdpr-5-2", "gdpr-32")),
)


def described() -> list[dict[str, str]]:
    """All headings as JSON values."""
    return [asdict(heading) for heading in HEADINGS]


def mapped(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The report's assumptions with the ids of the headings that each is relevant to.

    Raises:
        PrivacyError: an assumption belongs under no heading, so that the mapping is not of this version.
    """
    return [{**each, "headings": list(_headings(each["assumption"]))} for each in report["assumptions"]]


def _headings(assumption: str) -> tuple[str, ...]:
    for pattern, ids in _RULES:
        if re.search(pattern, assumption):
            return ids
    raise PrivacyError(
        f"the assumption {assumption!r} has no heading in this version of dpfa_hf: use the one that wrote the report"
    )
