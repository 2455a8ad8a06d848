"""Secure aggregation: a server learns the sum of a cohort's updates, and of no single one more than that.

The protocol of Bonawitz et al. (2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning") with its
safeguards against a server that lies: signed keys, and survivors that all parties confirm. A *party* adds up the
updates of its own clients: a site is one, in a simulation every client is. A round is five exchanges:

    keys      each party makes two key pairs, signs the public keys, and commits to a seed
    shares    each shares its seed and one private key among all, encrypted for each other party
    mask      each sends its sum plus the seed's mask, plus or minus a mask that it has in common with each other party
    confirm   each signs who has sent one
    unmask    each gives its shares of the seeds of those who have, and of the private keys of those who have not

The masks in common cancel in the sum of all. For who was lost after `shares` the server makes them from its private
key; nobody ever gives shares of both secrets of a party. Any `threshold` of the parties suffice, and fewer cannot be
made to tell anything. Sums are exact, modulo 2^32 (`fedit.secure.encoding`).

Read `party`, then `collector`.
"""
