"""The study of the paper: a profile, the SAEs that it trains, their scores, and the report on them."""
