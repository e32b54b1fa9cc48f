"""From files of text to arrays of tokens: formats, chat templates, masks, batches."""
