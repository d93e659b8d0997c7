"""The subcommands of `hf-actcompress`: arguments and tables only; each module has `add_parser`, and the work is done
elsewhere."""
