"""Which dictionaries and which text a target is measured with, so that a ledger can say it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fra.checkpoints.weights import hash_files, hash_tensors

if TYPE_CHECKING:
    from fra.targets.admission import AdmissionReport
    from fra.targets.file import DictionaryTable
    from fra.targets.target import Target

_FIRST_TOKENS = 8


def dictionaries(target: Target, admitted: AdmissionReport) -> list[dict[str, Any]]:
    """Of every dictionary of the target: hook, where it comes from, role (dictionary, crosscoder, seed or study),
    sha256 of its files (of its tensors, if it is a release's), and what admission found on the target's own text:
    features, L0 and explained variance (None of seeds and studies, which no admission measures).
    """
    quality = {("dictionary", found.hook): found for found in admitted.dictionaries}
    quality |= {("crosscoder", name): found for name, found in admitted.crosscoders.items()}
    spec = target.spec
    roles = {"dictionary": spec.saes, "crosscoder": spec.crosscoders, "seed": spec.seed, "study": spec.study}
    said = []
    for role, entries in roles.items():
        for entry in entries:
            named = Path(str(entry.path)).name if role == "crosscoder" else entry.hook
            own = quality.get((role, named))
            said.append(
                {
                    "hook": entry.hook,
                    "role": role,
                    "source": entry.path or f"{entry.release} {entry.sae_id}",
                    "sha256": _hash(target, entry, role),
                    "d_sae": own and own.d_sae,
                    "l0": own and own.l0,
                    "explained_variance": own and own.explained_variance,
                }
            )
    return said


def _hash(target: Target, entry: DictionaryTable, role: str) -> str | None:
    digest = hashlib.sha256()
    if entry.path is not None:
        hash_files(digest, target.files_of(entry))
    elif role == "dictionary":
        hash_tensors(digest, target.dictionaries[entry.hook].state_dict())
    else:
        return None  # not loaded for this alone
    return digest.hexdigest()


def text(target: Target) -> dict[str, Any]:
    """The target's text: where it comes from, its documents and independent sources, sha256 over names, sources and
    texts, and how the first document begins, token by token, BOS with it.
    """
    documents = target.documents()
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.name}\0{document.source}\0{len(document.text)}\0{document.text}".encode())
    start = [] if target.bos is None else [target.bos]
    first = [*start, *target.encode(documents[0].text[:200])][:_FIRST_TOKENS]
    return {
        "documents": target.spec.text.documents,
        "n_documents": len(documents),
        "n_sources": len({document.source for document in documents}),
        "sha256": digest.hexdigest(),
        "first_tokens": [target.tokenizer.decode([token]) for token in first],
    }
