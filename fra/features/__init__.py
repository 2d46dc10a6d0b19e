"""What features and channels of an attention-input dictionary look like to a person: where they are live and how
strong, measured on a target's own texts.
"""
