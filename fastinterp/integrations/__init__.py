"""fastinterp inside other libraries. Import a module of this package to use it: nothing else imports it."""
