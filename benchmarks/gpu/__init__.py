"""What a quarter of an hour on a lent GPU must prove and measure: ``check.sh`` and the stages that it runs."""
