"""The `qzoom` command: a verb's module is loaded only when that verb is used."""
