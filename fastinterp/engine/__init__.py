"""Where wishes, files and compute meet: plan from headers, run through the native pump, report what was done."""
