-- What a role needs besides to run workers, or to control them and read the answers.

GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA @schema@ TO @role@;
