"""``gblr run``: train or load, compress, fine-tune, convert, save, reload, and report."""
