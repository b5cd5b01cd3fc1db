-- Stops a session, wherever it runs.
-- KEYS  1 session hash, 2 deadlines zset, 3 tick hash
-- ARGV  1 id, 2 prefix of the workers' inboxes (same slot), 3 seconds that an inbox lives
-- gives {'missing', ms for which the store has surely lost nothing} | {'ended', state} | {'pending'} | {'running', worker}
-- Atomic: the flag and the word to its owner belong together, and a pending session must not be claimed between the look and the
-- flag. The flag decides: whoever ends the session from now on, its owner or who recovers it, ends it as cancelled; the inbox only
-- makes it quick. A pending one is due at once. Idempotent.
local s = redis.call('HMGET', KEYS[1], 'state', 'worker')
if not s[1] then
  return { 'missing', sure_for(KEYS[3], now_ms()) }
end
if ENDED[s[1]] then
  return { 'ended', s[1] }
end
redis.call('HSET', KEYS[1], 'cancel', '1')
if s[1] == 'pending' then
  redis.call('ZADD', KEYS[2], now_ms(), ARGV[1])
  return { 'pending' }
end
local inbox = ARGV[2] .. s[2]
redis.call('RPUSH', inbox, ARGV[1])
redis.call('EXPIRE', inbox, ARGV[3])
return { 'running', s[2] }
