from mergekit_nuslerp.kernel import nuslerp
