"""The audit of a private trainer: tries to refute its epsilon, with data of its own (`dpfa audit`).

`replay` moves one unit and measures how far the clipped sum goes, `noise_law` and `draws` test what chance does in real
steps, `canaries` attacks one run and turns correct guesses into a lower bound on epsilon, and `mutants` plants bugs to
show that these checks can fail. An audit that finds nothing proves nothing: it is evidence (P26).
"""

from dpfa_hf.audit.results import AUDIT_NAME, read_audit, write_audit

__all__ = ["AUDIT_NAME", "read_audit", "write_audit"]
