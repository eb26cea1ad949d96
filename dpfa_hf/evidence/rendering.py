"""The pages: one list of blocks, as Markdown and as one HTML file that needs nothing else.

Both begin with the section that the model card has, from the same writer. HTML is made from the Markdown by
markdown-it, which lets no markup of a name through; a policy in the page forbids scripts and outside references.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dpfa_hf.errors import PrivacyError
from dpfa_hf.evidence import headings, plots
from dpfa_hf.markdown import bullets, shown, table, up
from dpfa_hf.report import card_section

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_CSS = """
:root { color-scheme: light; }
body { color: #1b1f24; background: #fff; font: 16px/1.55 system-ui, "DejaVu Sans", Verdana, sans-serif;
  margin: 2rem auto; max-width: 54rem; padding: 0 1.2rem; }
h1, h2, h3, h4 { line-height: 1.25; margin: 2.2em 0 .6em; } h4 { margin: 1.6em 0 .4em; }
h1 { font-size: 1.8rem; margin-top: 0; } h2 { border-bottom: 1px solid #d9dee3; padding-bottom: .2em; }
table { border-collapse: collapse; font-size: .9rem; margin: 1em 0; width: 100%; }
th, td { border: 1px solid #d9dee3; overflow-wrap: anywhere; padding: .4em .6em; text-align: left; }
td, th { vertical-align: top; }
th { background: #f3f5f7; } thead tr:has(th:empty) { display: none; }
td:first-child { min-width: 11rem; }
code, pre { background: #f3f5f7; font: .85em/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
code { overflow-wrap: anywhere; padding: .1em .25em; } pre { overflow-x: auto; padding: .8em; } pre code { padding: 0; }
figure { margin: 1.6em 0; } figure svg { height: auto; max-width: 44rem; width: 100%; }
figcaption { color: #414a54; font-size: .9rem; }
.warning { background: #b3261e; color: #fff; font-weight: 700; margin: 0 0 1.5em; padding: .8em 1em; }
@media print { body { margin: 0; max-width: none; } figure, tr { break-inside: avoid; } }
""".strip()

_OPTIONS = {"html": False}
# ("markdown", text) or ("plot", name).
Block = tuple[str, str]


def markdown_page(evidence: Mapping[str, Any]) -> str:
    """`evidence.md`; of the plots it has the words, and points to the page that shows them."""
    described = {plot.name: plot for plot in plots.described(evidence)}

    def written(block: Block) -> str:
        kind, value = block
        if kind == "markdown":
            return value
        plot = described[value]
        return f"**{plot.title}.** {plot.meaning}\n\n{plot.description} (`evidence.html` shows the plot.)"

    return "\n\n".join(map(written, _blocks(evidence))) + "\n"


def html_page(evidence: Mapping[str, Any]) -> str:
    """`evidence.html`: self-contained, without scripts, and readable without the plots."""
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        raise PrivacyError('evidence needs markdown-it-py: pip install "dpfa-hf[evidence]"') from None
    markdown = MarkdownIt("commonmark", _OPTIONS).enable("table")
    described = {plot.name: plot for plot in plots.described(evidence)}

    def written(block: Block) -> str:
        kind, value = block
        if kind == "markdown":
            return str(markdown.render(value))
        plot = described[value]
        caption = f"<strong>{html.escape(plot.title)}.</strong> {html.escape(plot.meaning)}"
        return f"<figure>\n{plots.svg(value, evidence)}\n<figcaption>{caption}</figcaption>\n</figure>\n"

    report = evidence["report"]
    title = f"Evidence: {report['model']['class']}"
    warning = ""
    if not report["private"]:
        title = f"NOT PRIVATE: {title}"
        warning = f'<p class="warning" role="alert">NOT PRIVATE: {html.escape(report["not_private_because"])}</p>\n'
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_CSS}\n</style>\n</head>\n<body>\n<main>\n{warning}"
        f"{''.join(map(written, _blocks(evidence)))}</main>\n</body>\n</html>\n"
    )


def _blocks(evidence: Mapping[str, Any]) -> Iterator[Block]:
    report = evidence["report"]
    mark = "" if report["private"] else "NOT PRIVATE: "
    run = f" of run `{report['run']}`" if report["run"] else ""
    yield "markdown", f"# {mark}Evidence about a {shown(report['model']['class'])}"
    yield (
        "markdown",
        f"Written {evidence['created']} by `{evidence['tool']}` of dpfa_hf {shown(evidence['version'])}{run}, from "
        f"`privacy.json`, the plan in it{', `audit.json`' if evidence['audit'] else ''} and the files' hashes"
        f"{', held against the ledger' if evidence['ledger'] else '; no ledger was asked'}. `evidence.json` holds all "
        "of it for machines.",
    )
    yield "markdown", card_section(report)
    yield from _plots(evidence)
    yield "markdown", _audit(evidence)
    yield "markdown", _ledger(evidence)
    yield "markdown", _identity(evidence)
    yield "markdown", _headings(evidence)
    yield "markdown", _registry(evidence)


def _plots(evidence: Mapping[str, Any]) -> Iterator[Block]:
    described = plots.described(evidence)
    if not described:
        yield "markdown", "## Plots\n\nNone: the model is NOT PRIVATE, and there is no guarantee to draw."
        return
    yield "markdown", "## Plots\n\nAll curves are bounds, and follow from the plan: no data were read for them."
    for plot in described:
        yield "plot", plot.name


def _audit(evidence: Mapping[str, Any]) -> str:
    audit = evidence["audit"]
    if audit is None:
        return "## Audit\n\nNone: there was no `audit.json`. `dpfa audit` makes one."
    outcome = "It passed." if audit["passed"] else "**IT FAILED: the guarantee does not hold.**"
    checks = [(each["name"], "passed" if each["passed"] else "FAILED", each["what"]) for each in audit["checks"]]
    mutants = [
        (each["name"], f"caught by {each['by']}" if each["caught"] else "NOT CAUGHT") for each in audit["mutants"]
    ]
    parts = [
        "## Audit",
        f"{outcome} An audit looks for errors; it proves nothing about those that it did not find.",
        table(("Check", "Outcome", "What it looked at"), checks),
        table(("Planted bug", "Outcome"), mutants),
    ]
    for title, name in (("Smaller than the run", "scaled_down"), ("Not looked at", "not_looked_at")):
        if audit.get(name):
            parts += [f"### {title}", bullets(shown(each) for each in audit[name])]
    return "\n\n".join(parts)


def _ledger(evidence: Mapping[str, Any]) -> str:
    ledger = evidence["ledger"]
    if ledger is None:
        return (
            "## Ledger\n\nNo ledger was asked: what the run reserved and how many steps were charged is the report's "
            "word. `dpfa report --ledger URL` asks."
        )
    budget, sums = ledger["dataset_budget"], ledger["dataset_reserved"]
    rows = {
        "Ledger": ledger["place"],
        "Its last entry then": _entry(ledger["head"]),
        "Entry that opened the run": _entry(ledger["run_opened_by"]),
        "Entry that declared the data set": _entry(ledger["dataset_declared_by"]),
        "Run opened (UTC)": ledger["created"],
        "Status": ledger["status"],
        "Steps charged": ledger["steps_charged"],
        "Reserved by the run": _loss(ledger["reserved"]),
        "Reserved by all recorded runs on the data set": f"{_loss(sums)}; runs: {sums['runs']}",
        "Budget of the data set": "none" if budget is None else _loss(budget),
        "Same in report and ledger": ", ".join(ledger["checked"]),
    }
    return f"## Ledger\n\n{table(('', ''), rows.items())}"


def _identity(evidence: Mapping[str, Any]) -> str:
    code, data = evidence["code"], evidence["data"]
    here, commit = code["reported_with"], code["reported_with"]["commit"]
    same = {True: "the same code", False: "OTHER CODE than trained", None: "not known: the report does not have it"}
    git = "not a checkout"
    if commit is not None:
        git = f"{commit['sha']}{', with changes since' if commit['changed_since'] else ''}"
    rows = {
        "Trained with": ", ".join(f"{name} {value}" for name, value in code["trained_with"].items()),
        "Reported with": f"dpfa-hf {here['version']}, sha256 {here['sha256']}; commit: {git}",
        "Code of training and report": same[code["same_code"]],
        "Data set": f"{data['name']}; {data['units']} units ({data['privacy_unit']}, {data['adjacency']})",
        "Data set declared by": _entry(data["declared_by"]) if data["declared_by"] else "no ledger was asked",
        "privacy.json, SHA-256": evidence["privacy_sha256"],
        "audit.json, SHA-256": evidence["audit_sha256"] or "none",
    }
    rows |= {f"{each['path']}, SHA-256": f"{each['sha256']} ({each['bytes']:,} bytes)" for each in evidence["weights"]}
    if not evidence["weights"]:
        rows["Weights"] = "none were beside the report"
    return f"## Which code, data and files\n\n{table(('', ''), rows.items())}\n\n{data['why_no_fingerprint']}"


def _headings(evidence: Mapping[str, Any]) -> str:
    parts = ["## Where this may be relevant", headings.NO_VERDICT]
    for framework, title in evidence["frameworks"].items():
        parts.append(f"### {title}")
        for heading in (each for each in evidence["headings"] if each["framework"] == framework):
            relevant = [each for each in evidence["assumptions"] if heading["id"] in each["headings"]]
            contributes = heading["contributes"] if evidence["report"]["private"] else "The model is NOT PRIVATE."
            parts += [
                f"#### {heading['name']}",
                bullets((f"**Can contribute:** {contributes}", f"**Cannot:** {heading['cannot']}")),
            ]
            if relevant:
                rows = [(each["assumption"], each["status"]) for each in relevant]
                parts.append(table(("Assumption", "Status"), rows))
    return "\n\n".join(parts)


def _registry(evidence: Mapping[str, Any]) -> str:
    draft = evidence["deployments_registry"]
    title = "## Draft for the DP Deployments Registry"
    if draft is None:
        return f"{title}\n\nNone: the model is NOT PRIVATE."
    record = json.dumps(draft["record"], indent=2, ensure_ascii=False)
    # A longer fence than any that a name may hold.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", record)), default=0))
    return (
        f"{title}\n\nFields of {shown(draft['schema'])}. What is null only the operator knows.\n\n"
        f"{fence}json\n{record}\n{fence}"
    )


def _entry(entry: Mapping[str, Any]) -> str:
    return f"{entry['sequence']}, hash {entry['hash']}"


def _loss(loss: Mapping[str, Any]) -> str:
    return f"ε = {up(loss['epsilon'])}, δ = {up(loss['delta'])}"
