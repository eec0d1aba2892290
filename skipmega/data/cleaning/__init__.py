"""From raw documents to those worth training on: filtered, without duplicates, without evaluation sets."""
