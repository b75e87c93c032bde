"""The search: what runs next, what stops and what it cost (`desk`), who proposes (`algorithms`)."""
