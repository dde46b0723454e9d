"""What a comparison found: the document, its verdict, pictures and pages."""
