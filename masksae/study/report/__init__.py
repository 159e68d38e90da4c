"""Tables, verdicts and pages, from rows of results; nothing is computed here that a result file does not hold."""
