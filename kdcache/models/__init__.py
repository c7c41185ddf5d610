"""What teachers and students share: a language model split into its body and its LM head."""
