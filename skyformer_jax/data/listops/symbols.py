"""The symbols of ListOps and their token ids."""

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = (*"0123456789", *OPERATORS, "]")
TOKENS = {symbol: i + 1 for i, symbol in enumerate(SYMBOLS)}  # id 0 is padding
VOCAB_SIZE = len(SYMBOLS) + 1
FIRST_OPERATOR, CLOSE = TOKENS["[MIN"], TOKENS["]"]
