"""The commands `ovq demo | train | eval | bench | reproduce`; `ovq.plugins` names them."""
