"""PocketBooth: does a personalized model show the subject, and does it still do as it is told?

After the DreamBooth benchmark (Ruiz et al. 2023, section 4.1), at the size of the built-in models.
"""
