"""Files, errors, ports and versions: helpers that know nothing of towers or of LLaVA."""
