"""A vision-language model as a reranker: it reads query and candidate together and answers yes or no."""
