"""Records of text to rows of ids and labels, with NumPy alone.

`formats.FORMATS` has the formats of records; `glm_ms.families.build_encoder` combines one with a tokenizer. Import from
the modules: reading settings needs the table of formats, but not NumPy.
"""
