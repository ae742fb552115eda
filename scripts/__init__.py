"""Small programs that write pages or look at the code."""
