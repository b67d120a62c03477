"""Problems with ScienceQA's schema: the embedded miniature and data on disk."""
