"""The `qzoom` command: one module a verb, loaded only when that verb is used."""
