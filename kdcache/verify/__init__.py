"""Verify a cache: its bytes, its content (`stored`, no torch), or its teacher (`against_teacher`)."""
